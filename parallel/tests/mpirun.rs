//! The MPI back end under a real mpirun: `examples/comm_check.rs` on 1, 2, 3, 4 and 9 ranks and `dispatch_check.rs` on 4, bit
//! for bit against threads; and that a mistake of one rank ends the job.

use std::path::PathBuf;
use std::process::{Command, Output};

fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let path = test.ancestors().nth(2).expect("target/release").join("examples").join(name);
    assert!(path.exists(), "{} is missing: `cargo test -p parallel` builds it", path.display());
    path
}

/// As root, on a machine with fewer cores than ranks. `timeout` ends a hang; it is far above what a busy machine needs.
fn mpirun(name: &str, num_ranks: usize, args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["--kill-after=5", "240", "mpirun", "--oversubscribe", "-n", &num_ranks.to_string()])
        .arg(example(name))
        .args(args)
        .envs([
            ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
            ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
            ("OMPI_MCA_mpi_yield_when_idle", "1"),
            ("OMPI_MCA_hwloc_base_binding_policy", "none"),
            ("OMPI_MCA_btl_tcp_if_include", "lo"),
            ("OMPI_MCA_oob_tcp_if_include", "lo"),
        ])
        .output()
        .expect("timeout and mpirun are installed")
}

#[test]
fn mpi_and_threads_give_the_same_bits() {
    for num_ranks in [1, 2, 3, 4, 9] {
        let output = mpirun("comm_check", num_ranks, &[]);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{num_ranks} ranks: {:?}\n{out}\n{err}", output.status);
        assert!(out.contains(&format!("comm_check: {num_ranks} ranks equal")), "{out}\n{err}");
    }
}

#[test]
fn experts_over_mpi_and_threads_give_the_same_bits_and_the_formula_s_bytes() {
    let output = mpirun("dispatch_check", 4, &[]);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("dispatch_check: 4 ranks equal"), "{:?}\n{out}\n{err}", output.status);
}

#[test]
fn a_panic_of_one_rank_ends_the_job() {
    let output = mpirun("comm_check", 2, &["--panic", "1"]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{err}");
    assert!(err.contains("rank 1 breaks as asked"), "{err}");
}

#[test]
fn a_message_of_the_wrong_size_is_an_error_on_the_receiver() {
    let output = mpirun("comm_check", 2, &["--wrong-size"]);
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(out.contains("a receive of 40 bytes") && out.contains("a send of 8"), "{out}\n{}", String::from_utf8_lossy(&output.stderr));
}
