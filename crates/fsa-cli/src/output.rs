//! The only place that prints. Results go to standard output, as tables and lines or as one JSON
//! document; errors go to standard error.

use crate::failure::{Failure, Outcome};
use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use serde::Serialize;
use std::io::{self, ErrorKind, IsTerminal, Write};

/// Where and how results are printed.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
    color: bool,
}

/// A result that can be shown to a person; its serialised form is the JSON schema of the command.
pub trait Report: Serialize {
    /// Prints tables and lines.
    fn show(&self, output: &Output) -> Outcome;
}

impl Output {
    /// `json` prints documents only; colors need a terminal, and neither `no_color` nor `NO_COLOR`.
    pub fn new(json: bool, no_color: bool) -> Self {
        let wanted = !no_color && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { json, color: wanted && io::stdout().is_terminal() }
    }

    /// Prints a result in the form that was asked for.
    pub fn report(&self, report: &impl Report) -> Outcome {
        if !self.json {
            return report.show(self);
        }
        let text = serde_json::to_string_pretty(report)
            .map_err(|error| Failure::Check(format!("the result cannot be written as JSON: {error}")))?;
        self.line(text)
    }

    /// Prints one line of text, or several.
    pub fn line(&self, text: impl AsRef<str>) -> Outcome {
        let mut stdout = io::stdout().lock();
        match writeln!(stdout, "{}", text.as_ref()).and_then(|()| stdout.flush()) {
            // The reader has seen enough, as in `fsa info | head -1`.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|source| Failure::File {
                path: "standard output".into(),
                action: "cannot be written",
                source,
            }),
        }
    }

    /// Prints one line for people only: nothing where a document was asked for.
    pub fn note(&self, text: impl AsRef<str>) -> Outcome {
        if self.json { Ok(()) } else { self.line(text) }
    }

    /// Prints a table.
    pub fn table(&self, table: &Table) -> Outcome {
        self.line(table.trim_fmt())
    }

    /// An empty table. Columns named with a leading `<` hold text and are left-aligned, the others right.
    pub fn new_table(&self, header: &[&str]) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        // Without a terminal the width is unknown, and a table cut at a guess helps nobody.
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header.iter().map(|name| name.trim_start_matches('<')));
        for (column, name) in table.column_iter_mut().zip(header) {
            let text = name.starts_with('<');
            column.set_cell_alignment(if text { CellAlignment::Left } else { CellAlignment::Right });
        }
        if self.color {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table
    }

    /// A cell that says whether something holds.
    pub fn verdict(&self, holds: bool) -> Cell {
        let (word, color) = if holds { ("ok", Color::Green) } else { ("FAILED", Color::Red) };
        Cell::new(word).fg(color)
    }
}

/// Prints an error.
pub fn error(failure: &Failure) {
    // Nowhere is left to report that standard error is closed.
    let _ = writeln!(io::stderr().lock(), "error: {failure}");
}

/// Bytes with a binary unit.
pub fn bytes(count: usize) -> String {
    let mut value = count as f64;
    let units = ["B", "KiB", "MiB", "GiB"];
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// Milliseconds with a unit that fits.
pub fn duration(milliseconds: f64) -> String {
    if milliseconds >= 1000.0 {
        format!("{:.2} s", milliseconds / 1000.0)
    } else if milliseconds >= 10.0 {
        format!("{milliseconds:.1} ms")
    } else {
        format!("{milliseconds:.3} ms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_carry_a_unit_that_fits() {
        assert_eq!([0, 1023, 1024, 3 << 20].map(bytes), ["0 B", "1023 B", "1.0 KiB", "3.0 MiB"]);
        assert_eq!([0.5, 12.34, 2500.0].map(duration), ["0.500 ms", "12.3 ms", "2.50 s"]);
    }
}
