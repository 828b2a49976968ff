//! Why a command did not succeed, and the exit code that says so.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

/// Result of a command.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The library refused the arguments, or could not run.
    #[error(transparent)]
    Library(#[from] fsa::Error),
    /// A file could not be read or written.
    #[error("{path}: {action}: {source}")]
    File {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The run itself was fine and its result is wrong.
    #[error("{0}")]
    Check(String),
}

impl Failure {
    /// Misuse of a flag, a file or a tensor: names it, what was expected and what came.
    pub fn misuse(argument: impl Into<String>, expected: impl Display, got: impl Display) -> Self {
        Self::Library(fsa::Error::input(argument, expected, got))
    }

    /// A closure for `map_err` on what was tried with a file.
    pub fn file(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::File { path, action, source }
    }

    /// 2 for misuse, 1 for a failed check or run.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Library(fsa::Error::Input(_) | fsa::Error::Unsupported { .. }) | Self::File { .. } => {
                ExitCode::from(2)
            }
            Self::Library(_) | Self::Check(_) => ExitCode::from(1),
        }
    }
}
