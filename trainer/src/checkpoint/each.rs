//! The files of a checkpoint or an export, shared out among the cores.
use anyhow::Result;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::scope;

/// `work(i)` for every i below `count`, in order of i, by a thread a core that each `open` what they work with. The first error
/// ends it.
pub fn each<S: Send>(
    count: usize,
    open: impl Fn() -> Result<S> + Sync,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<Vec<S>> {
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get()).min(count);
    let next = AtomicUsize::new(0);
    let one = || -> Result<S> {
        let mut state = open()?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return Ok(state);
            }
            work(&mut state, index).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
        }
    };
    scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running.into_iter().map(|thread| thread.join().expect("a file's thread does not panic")).collect()
    })
}
