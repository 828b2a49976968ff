//! Errors: enums with fields, so that a caller can act on them and a message can name the
//! argument, what was expected and what came.

use std::fmt;

/// Result of every fallible function of the project.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An argument that does not satisfy its contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputError {
    /// Name of the argument, as the public function spells it.
    pub argument: String,
    /// What the argument must be.
    pub expected: String,
    /// What it was.
    pub got: String,
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, got {}", self.argument, self.expected, self.got)
    }
}

impl std::error::Error for InputError {}

/// Any error of the project. Nothing has been written to a caller's tensor when one is returned
/// by a validation; a backend failure names the backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument breaks its contract.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Valid input that this build or backend does not support.
    #[error("{constraint} is not supported: got {got}, supported: {supported}")]
    Unsupported {
        /// What is constrained.
        constraint: String,
        /// The value that was asked for.
        got: String,
        /// The values that are supported.
        supported: String,
    },
    /// Memory for a named object could not be had.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// The object.
        what: String,
        /// Its size.
        bytes: usize,
    },
    /// A failure inside a backend: a driver or compiler error with its log, a thread pool that did not start.
    #[error("{backend} backend: {message}")]
    Backend {
        /// Name of the backend.
        backend: String,
        /// What happened, with its log.
        message: String,
    },
}

impl Error {
    /// An [`InputError`] as an [`Error`].
    pub fn input(argument: impl Into<String>, expected: impl fmt::Display, got: impl fmt::Display) -> Self {
        Self::Input(InputError { argument: argument.into(), expected: expected.to_string(), got: got.to_string() })
    }

    /// The argument that an input error names, if this is one.
    pub fn argument(&self) -> Option<&str> {
        match self {
            Self::Input(error) => Some(&error.argument),
            _ => None,
        }
    }
}

/// Returns an input error unless `holds`.
pub(crate) fn ensure(
    holds: bool,
    argument: &str,
    expected: impl FnOnce() -> String,
    got: impl FnOnce() -> String,
) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::input(argument, expected(), got())) }
}
