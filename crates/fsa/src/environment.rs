//! The environment variables that the library reads, in one place.

use fsa_core::{Error, Result};

/// Name and meaning of every environment variable that the library reads.
///
/// ```
/// let names: Vec<_> = fsa::VARIABLES.iter().map(|(name, _)| *name).collect();
/// assert_eq!(names, ["FSA_NUM_THREADS", "RAYON_NUM_THREADS"]);
/// ```
pub const VARIABLES: [(&str, &str); 2] = [
    ("FSA_NUM_THREADS", "worker threads of the CPU backend; 0 or unset: RAYON_NUM_THREADS decides"),
    ("RAYON_NUM_THREADS", "worker threads of the CPU backend; 0 or unset: one per core"),
];

/// What the environment asks for.
///
/// ```
/// # fn main() -> fsa::Result<()> {
/// let lookup = |name: &str| (name == "RAYON_NUM_THREADS").then(|| "3".to_string());
/// assert_eq!(fsa::Environment::from_lookup(lookup)?.threads, Some(3));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Environment {
    /// Worker threads of the CPU backend; `None` is one per core.
    pub threads: Option<usize>,
}

impl Environment {
    /// Reads the variables of this process.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] that names a variable which does not hold a number.
    ///
    /// ```
    /// # fn main() -> fsa::Result<()> {
    /// let environment = fsa::Environment::read()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn read() -> Result<Self> {
        Self::from_lookup(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// Reads the variables through `lookup`, which gives the value of a name.
    ///
    /// # Errors
    ///
    /// [`Error::Input`] that names a variable which does not hold a number.
    ///
    /// ```
    /// let error = fsa::Environment::from_lookup(|_| Some("many".into())).expect_err("not a number");
    /// assert_eq!(error.to_string(), "FSA_NUM_THREADS: expected a number of threads, got \"many\"");
    /// ```
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        for (name, _) in VARIABLES {
            let Some(text) = lookup(name).filter(|text| !text.trim().is_empty()) else { continue };
            match text.trim().parse::<usize>() {
                Ok(0) => {}
                Ok(threads) => return Ok(Self { threads: Some(threads) }),
                Err(_) => return Err(Error::input(name, "a number of threads", format!("{text:?}"))),
            }
        }
        Ok(Self::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fsa: &str, rayon: &str) -> Result<Option<usize>> {
        let lookup = |name: &str| Some(if name == "FSA_NUM_THREADS" { fsa } else { rayon }.to_string());
        Environment::from_lookup(lookup).map(|environment| environment.threads)
    }

    #[test]
    fn the_own_variable_wins_and_zero_or_nothing_leaves_it_to_the_next() {
        assert_eq!(Environment::from_lookup(|_| None), Ok(Environment { threads: None }));
        for (fsa, rayon, threads) in [("4", "2", Some(4)), ("", "2", Some(2)), ("0", " 2 ", Some(2)), ("0", "0", None)]
        {
            assert_eq!(read(fsa, rayon), Ok(threads), "{fsa:?} {rayon:?}");
        }
    }

    #[test]
    fn a_value_that_is_no_number_names_its_variable() {
        for (fsa, rayon, name) in [("-1", "2", "FSA_NUM_THREADS"), ("", "1.5", "RAYON_NUM_THREADS")] {
            assert_eq!(read(fsa, rayon).expect_err("no number").argument(), Some(name));
        }
    }
}
