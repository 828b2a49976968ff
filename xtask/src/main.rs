//! Developer commands that have logic; those that have none are in the `justfile`.
//!
//! - `cargo xtask layers`: dependencies between the crates point one way;
//! - `cargo xtask sizes`: no source file is longer than one idea;
//! - `cargo xtask stages`: every stage has its place, under its name, everywhere;
//! - `cargo xtask readme [--check]`: the performance tables of the README come from committed records.
//!
//! Each exits with 1 and one line per finding if something is wrong, with 2 on misuse.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the commands print their findings")]

mod layers;
mod readme;
mod sizes;
mod stages;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Something that a command found, or why it could not look.
type Findings = Result<Vec<String>, String>;

const USAGE: &str = "usage: cargo xtask layers | sizes | stages | readme [--check]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let root = repository();
    let findings = match words[..] {
        ["layers"] => layers::run(&root),
        ["sizes"] => sizes::run(&root),
        ["stages"] => stages::run(&root),
        ["readme"] => readme::write(&root),
        ["readme", "--check"] => readme::check(&root),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    report(words[0], findings)
}

fn report(command: &str, findings: Findings) -> ExitCode {
    match findings {
        Ok(findings) if findings.is_empty() => {
            println!("{command}: ok");
            ExitCode::SUCCESS
        }
        Ok(findings) => {
            findings.iter().for_each(|finding| println!("{command}: {finding}"));
            ExitCode::FAILURE
        }
        Err(reason) => {
            eprintln!("{command}: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Root of the repository: this crate lies one level below it.
fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Standard output of a command, or why there is none.
fn output(root: &Path, program: &str, arguments: &[&str]) -> Result<String, String> {
    let shown = format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).current_dir(root).output();
    let output = output.map_err(|error| format!("{shown}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{shown}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{shown}: {error}"))
}

/// Text of a file, or why there is none.
fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Files that git tracks or would track, relative to the root, those with one of `extensions`.
fn files(root: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let listed = output(root, "git", &["ls-files", "--cached", "--others", "--exclude-standard"])?;
    let wanted = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| extensions.contains(&extension)) && root.join(path).is_file()
    };
    Ok(listed.lines().map(PathBuf::from).filter(wanted).collect())
}
