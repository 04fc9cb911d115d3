//! What the set-up scripts ask for: run beside stand-ins for apt and for a Python that has neither pip nor ensurepip.
use crate::support::root;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// A checkout of the scripts alone.
fn checkout() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["scripts/setup.sh", "scripts/test-venv.sh", "scripts/apt.sh", "tests/oracle/requirements.txt"] {
        let to = folder.path().join(file);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(root().join(file), to).expect("a copy");
    }
    fs::create_dir(folder.path().join("bin")).expect("a folder");
    for (name, script) in [("apt-get", "exit 1"), ("id", "echo 0"), ("python", "case $1 in -) exit 0 ;; *) exit 1 ;; esac")] {
        let path = folder.path().join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        assert!(Command::new("chmod").arg("+x").arg(&path).status().expect("chmod").success());
    }
    folder
}

/// Whether it succeeds, and all that it says.
fn run(folder: &Path, script: &str, torch: Option<&Path>) -> (bool, String) {
    let mut command = Command::new("bash");
    let path = format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").expect("a path"));
    command.arg(folder.join("scripts").join(script)).env("PATH", path).env("PYTHON", "python").env_remove("LIBTORCH");
    let output = command.envs(torch.map(|torch| ("LIBTORCH", torch))).output().expect("a shell");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), said)
}

#[test]
fn pip_is_asked_for_where_libtorch_is_downloaded_and_ensurepip_by_the_tests_alone() {
    let (there, named, bare) = (checkout(), checkout(), checkout());
    symlink(root().join(".deps"), there.path().join(".deps")).expect("a link");
    let (done, said) = run(there.path(), "setup.sh", None);
    assert!(done && said.contains("nothing to do"), "{said}");
    let (done, said) = run(named.path(), "setup.sh", Some(&root().join(".deps/torch-lib/..")));
    assert!(done && said.contains(".deps/libtorch -> "), "{said}");
    let (done, said) = run(bare.path(), "setup.sh", None);
    assert!(!done && said.ends_with("needed: python3-pip\n"), "{said}");
    let (done, said) = run(bare.path(), "test-venv.sh", None);
    assert!(!done && said.ends_with("needed: python3-venv\n"), "{said}");
}
