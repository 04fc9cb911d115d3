//! The invariants of ARCHITECTURE.md, read off the sources.
use crate::support::root;
use std::fs;
use std::path::{Path, PathBuf};

const CRATES: [&str; 7] = ["data", "kernels", "launch", "model", "parallel", "tests", "trainer"];

fn sources(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path, endings));
        } else if path.extension().is_some_and(|ending| endings.contains(&ending.to_str().expect("text"))) {
            found.push(path);
        }
    }
    found
}

/// (path below the root, text) of every Rust and CUDA source.
fn all_sources() -> Vec<(String, String)> {
    CRATES
        .iter()
        .flat_map(|name| sources(&root().join(name), &["rs", "cu", "cuh", "cpp"]))
        .map(|path| (path.strip_prefix(root()).expect("below the root").display().to_string(), fs::read_to_string(&path).expect("text")))
        .collect()
}

fn dependencies(name: &str) -> Vec<String> {
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest")).expect("TOML");
    manifest["dependencies"].as_table().map(|table| table.keys().cloned().collect()).unwrap_or_default()
}

#[test]
fn crates_depend_only_as_drawn() {
    let allowed: [(&str, &[&str]); 6] = [
        ("data", &[]),
        ("launch", &[]),
        ("kernels", &[]),
        ("parallel", &["kernels"]),
        ("model", &["kernels", "parallel"]),
        ("trainer", &["data", "kernels", "model", "parallel"]),
    ];
    for (name, allowed) in allowed {
        let ours: Vec<String> = dependencies(name).into_iter().filter(|dependency| CRATES.contains(&dependency.as_str())).collect();
        assert!(ours.iter().all(|dependency| allowed.contains(&dependency.as_str())), "{name} depends on {ours:?}, drawn are {allowed:?}");
    }
    for leaf in ["data", "launch"] {
        assert!(!dependencies(leaf).iter().any(|dependency| dependency.starts_with("tch") || dependency == "torch-sys"), "{leaf} needs no libtorch");
    }
    for name in ["kernels", "parallel", "model"] {
        assert!(!dependencies(name).contains(&"tokio".to_string()), "no tokio near a collective: {name}");
    }
}

#[test]
fn unsafe_stands_only_where_allowed_and_says_why() {
    let allowed = |path: &str| {
        ["device", "jit", "launch", "shim"].iter().any(|name| path.starts_with(&format!("kernels/src/{name}")))
            || ["mpi", "nccl", "peer"].iter().any(|name| path.starts_with(&format!("parallel/src/comm/{name}")))
    };
    for (path, text) in all_sources().iter().filter(|(path, _)| path.ends_with(".rs") && !path.starts_with("tests/")) {
        let uses = text.lines().any(|line| !line.trim_start().starts_with("//") && (line.contains("unsafe {") || line.contains("unsafe fn") || line.contains("unsafe impl")));
        assert!(!uses || allowed(path), "{path} has unsafe code");
        assert!(!uses || text.contains("SAFETY:"), "{path} does not say why its unsafe code is right");
    }
}

#[test]
fn autograd_runs_only_in_tests() {
    for (path, text) in all_sources() {
        let test = path.starts_with("tests/") || path.contains("/tests");
        let text = text.split("#[cfg(test)]\nmod tests {").next().expect("split gives one");
        for call in ["set_requires_grad(", ".backward()"] {
            assert!(test || !text.contains(call), "{path} calls {call}");
        }
    }
}

#[test]
fn no_feature_switches_code_off_and_the_environment_is_read_in_one_place() {
    for name in CRATES {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
        assert!(!manifest.contains("[features]"), "{name} has cargo features");
    }
    for (path, text) in all_sources() {
        let reads = text.contains("env::var");
        let allowed = path.starts_with("tests/") || path.ends_with("environment.rs") || path.starts_with("launch/") || path.contains("build.rs") || path.contains("/tests/") || path.contains("/examples/");
        assert!(!reads || allowed, "{path} reads the environment");
        assert!(!text.contains(concat!("static", " mut")), "{path} has process-wide mutable state");
    }
}

#[test]
fn files_functions_and_names_stay_small() {
    for (path, text) in all_sources() {
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() <= 500, "{path} has {} lines", lines.len());
        let file = Path::new(&path).file_stem().and_then(|stem| stem.to_str()).expect("a name");
        assert!(!["utils", "util", "helpers", "helper", "misc", "common"].contains(&file), "{path}: a name that says nothing");
        assert!(!text.contains(concat!("#[", "ignore")), "{path} has a test that never runs");
        if path.ends_with(".rs") {
            functions_fit_a_screen(&path, &lines);
        }
    }
}

/// A function ends where a brace stands at its own indentation.
fn functions_fit_a_screen(path: &str, lines: &[&str]) {
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let begins = ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "async fn ", "pub async fn ", "unsafe fn "].iter().any(|word| code.starts_with(word));
        if !begins || code.ends_with(';') {
            continue;
        }
        let indent = &line[..line.len() - code.len()];
        let one_line = code.ends_with('}') || code.ends_with("},");
        let end = lines[start..].iter().position(|line| *line == format!("{indent}}}") || line.starts_with(&format!("{indent}}}")));
        let end = if one_line { 0 } else { end.unwrap_or_else(|| panic!("{path}:{}: where does this function end?", start + 1)) };
        assert!(end <= 75, "{path}:{}: a function of {end} lines", start + 1);
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (path, text) in all_sources() {
        if path.ends_with(".rs") && !path.ends_with("build.rs") && !path.ends_with("/tests.rs") {
            assert!(text.starts_with("//!") || text.starts_with("#!["), "{path} has no head");
        }
    }
}

#[test]
fn the_project_speaks_of_itself_alone() {
    let words = [concat!("/", "work/"), concat!("/", "root/"), concat!("/", "home/")];
    for (path, text) in all_sources() {
        for word in words {
            assert!(!text.contains(word), "{path} names a path of one machine: {word}");
        }
    }
}
