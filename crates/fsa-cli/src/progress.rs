//! Progress on standard error, for anything that may take longer than a second. Hidden when standard
//! error is not a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// How often an unfinished step is redrawn. Rare, so that it does not show in a measured time.
const TICK: Duration = Duration::from_millis(250);

/// A progress bar over named steps.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar of `steps` steps. `indicatif` draws on a terminal only, and honours `NO_COLOR`.
    pub fn new(steps: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("[{elapsed_precise}] {wide_bar} {pos}/{len}  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(TICK);
        Self { bar }
    }

    /// Names the step that starts now.
    pub fn start(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
    }

    /// Ends a step.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// Runs a step.
    pub fn step<T>(&self, what: impl Into<String>, run: impl FnOnce() -> T) -> T {
        self.start(what);
        let result = run();
        self.advance();
        result
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
