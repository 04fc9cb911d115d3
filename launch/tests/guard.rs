//! What a guard does about processes that it cannot end. A test of its own: it waits for every child of its process.
use launch::guard::end_descendants;
use nix::sys::signal::Signal;
use std::process::Command;
use std::time::Duration;

/// A process that stands in the kernel cannot be had at will: one that gets another signal than KILL outlives it as well.
#[test]
fn what_does_not_end_is_named_and_left() {
    let mut child = Command::new("sleep").arg("1000").spawn().expect("a process");
    let (code, left) = end_descendants(child.id(), Signal::SIGURG, Duration::from_millis(200));
    assert!(code.is_none() && left.len() == 1 && left[0].starts_with(&format!("{} (sleep, state ", child.id())), "{code:?} {left:?}");
    let ended = end_descendants(child.id(), Signal::SIGKILL, Duration::from_secs(600));
    assert_eq!(ended, (Some(137), Vec::new()));
    assert!(child.wait().is_err(), "it was taken note of");
}
