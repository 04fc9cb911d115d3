//! The threads that requests are answered by. Invariant: whoever drops them does not wait. A read of a file system that hangs
//! is a thread that nobody can end; tokio would wait for it, and the error that tells of it would never be seen.

use std::ops::Deref;

use tokio::runtime::Runtime;

use crate::DataError;

pub(crate) struct Background(Option<Runtime>);

impl Background {
    /// `name`: of the threads.
    pub fn start(threads: usize, name: &str) -> Result<Background, DataError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).thread_name(name).enable_all().build();
        Ok(Background(Some(runtime.map_err(DataError::io("tokio", "start"))?)))
    }
}

impl Deref for Background {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("only drop takes it")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.take().expect("only drop takes it").shutdown_background();
    }
}
