//! Runs a call: without the interpreter lock, with panics caught.

use crate::failure::Failure;
use fsa::{Engine, Result};
use pyo3::Python;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

/// The engine, and the process whose threads it started.
static ENGINE: Mutex<Option<(u32, Engine)>> = Mutex::new(None);

/// The engine of this process. A forked child (a data loader's worker) inherits the memory of its parent's
/// engine and none of its threads, and would wait for them for ever: it starts its own.
fn engine() -> Result<Engine> {
    let process = std::process::id();
    let mut slot = ENGINE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((owner, engine)) = &*slot
        && *owner == process
    {
        return Ok(engine.clone());
    }
    let engine = Engine::cpu()?;
    let stale = slot.replace((process, engine.clone()));
    std::mem::forget(stale); // dropping it would wait for threads that do not exist
    Ok(engine)
}

/// Runs `work` on the engine, [`detached`].
pub fn run<T: Send>(py: Python<'_>, work: impl FnOnce(&Engine) -> Result<T> + Send) -> Result<T, Failure> {
    detached(py, || work(&engine()?))
}

/// Releases the interpreter lock, runs `work`, and turns an error or a panic into an exception.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> Result<T, Failure> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(result) => Ok(result?),
        Err(panic) => Err(Failure::from_panic(message(&*panic))),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic without a message")
}
