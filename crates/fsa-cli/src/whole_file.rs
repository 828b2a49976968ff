//! Files that appear whole or not at all: written under a temporary name in the target's directory,
//! then renamed.

use crate::failure::{Failure, Outcome};
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file in the making. Dropped before [`WholeFile::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct WholeFile {
    temporary: NamedTempFile,
    target: PathBuf,
}

impl WholeFile {
    /// Opens the temporary file, so that a directory that cannot be written is an error before the work starts.
    pub fn create(target: &Path) -> Outcome<Self> {
        if target.is_dir() {
            return Err(Failure::misuse(target.display().to_string(), "a file to write", "a directory"));
        }
        let directory = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".fsa-").suffix(".part");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // The default of a temporary file is private; the result is an ordinary file, by the user's umask.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let temporary = builder.tempfile_in(directory).map_err(Failure::file(target, "cannot be written"))?;
        Ok(Self { temporary, target: target.to_path_buf() })
    }

    /// Name of the temporary file, for writers that open files themselves.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Writes everything and gives the file its name.
    pub fn write(mut self, content: &[u8]) -> Outcome {
        let failed = Failure::file(&self.target, "cannot be written");
        self.temporary.write_all(content).and_then(|()| self.temporary.flush()).map_err(failed)?;
        self.finish()
    }

    /// Gives the file its name.
    pub fn finish(self) -> Outcome {
        let failed = Failure::file(&self.target, "cannot be written");
        self.temporary.persist(&self.target).map(|_| ()).map_err(|error| failed(error.error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_file_leaves_nothing_and_keeps_what_was_there() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let target = directory.path().join("out");
        std::fs::write(&target, "old").expect("written");
        drop(WholeFile::create(&target).expect("opened"));
        assert_eq!(std::fs::read_to_string(&target).expect("readable"), "old");
        WholeFile::create(&target).expect("opened").write(b"new").expect("written");
        assert_eq!(std::fs::read_to_string(&target).expect("readable"), "new");
        assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 1);
    }

    #[test]
    fn a_missing_directory_is_named() {
        let failure = WholeFile::create(Path::new("/nowhere/at/all/out.json")).expect_err("missing");
        assert!(failure.to_string().starts_with("/nowhere/at/all/out.json: cannot be written"), "{failure}");
    }
}
