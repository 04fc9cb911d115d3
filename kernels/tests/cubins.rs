//! Every kernel compiles to a cubin without a GPU, keeps its registers, and the GEMMs use the FP8 matrix unit.
//! NVRTC, and cuobjdump to look into the cubins, are in the test venv (scripts/test-venv.sh), or TIEFSEE_NVRTC names the lib folder
//! of another CUDA.
use kernels::jit::{Jit, JitError, Source};
use kernels::ops::{adamw, attention, checksum, cross_entropy, gate, gemm_fp8, gradient_norm, mla_heads, normal, quantise, rms_norm, routes, swiglu, unpermute, wide_linear};
use std::path::{Path, PathBuf};
use std::process::Command;

/// CUDA's lib folder.
fn folder() -> Option<PathBuf> {
    let named = std::env::var_os("TIEFSEE_NVRTC").map(PathBuf::from);
    let pythons = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/venv/lib"));
    let found = pythons.into_iter().flatten().flatten().map(|python| python.path().join("site-packages/nvidia/cu13/lib"));
    named.into_iter().chain(found).find(|folder| folder.join("libnvrtc.so.13").exists())
}

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("tiefsee-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    path
}

fn cuobjdump(folder: &Path, cubin: &Path, what: &str) -> Option<String> {
    let bin = folder.join("../bin");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
    let run = Command::new(bin.join("cuobjdump")).env("PATH", path).arg(what).arg(cubin).output().ok()?;
    run.status.success().then(|| String::from_utf8_lossy(&run.stdout).into_owned())
}

/// The numbers after every `key:`, one a kernel, added up.
fn usage(text: &str, key: &str) -> u32 {
    let key = format!("{key}:");
    assert!(text.contains(&key), "no {key} in {text}");
    let number = |after: &str| after.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u32>().expect("a number");
    text.split(&key).skip(1).map(number).sum()
}

/// Are all that an FFMA reads registers of even number, or all of odd?
fn in_one_bank(line: &str) -> bool {
    let operands = line.split_once("FFMA").map_or("", |(_, rest)| rest).split(',').skip(1);
    let number = |operand: &str| operand.trim().strip_prefix('R')?.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok();
    let read: Vec<Option<u32>> = operands.map(number).collect();
    read.len() == 3 && read.iter().all(|register| register.is_some() && register.map(|n| n % 2) == read[0].map(|n| n % 2))
}

fn check(folder: &Path, jit: &Jit, cache: &Path, (source, entry): &(Source, &str)) -> bool {
    let variant = format!("{} {:?}", source.name, source.defines);
    let cubin = jit.cubin(source).unwrap_or_else(|error| panic!("{variant}: {error}"));
    assert!(cubin.starts_with(b"\x7fELF"), "{variant}: not a cubin");
    let file = cache.join("one.cubin");
    std::fs::write(&file, &cubin).expect("the cache is writable");
    let Some(resources) = cuobjdump(folder, &file, "-res-usage") else {
        return false;
    };
    assert!(resources.contains(entry), "{variant}: no {entry} in {resources}");
    assert_eq!(usage(&resources, "STACK") + usage(&resources, "LOCAL"), 0, "{variant} spills: {resources}");
    let Some(sass) = cuobjdump(folder, &file, "-sass") else {
        return false;
    };
    let (fp8, bf16) = (source.name.starts_with("gemm"), source.name == "attention_backward");
    let count = |what| sass.matches(what).count();
    assert_eq!((count("QGMMA") > 0, count("HGMMA") > 0), (fp8, bf16), "{variant}: FP8 and BF16 matrix instructions");
    assert!(!(fp8 || bf16) || sass.contains("UTMALDG"), "{variant}: no bulk copies");
    // The compiler may make each wait for the one before, and only warns of it.
    assert!(2 * count("WARPGROUP.DEPBAR") <= count("QGMMA") + count("HGMMA"), "{variant}: multiplications wait for each other");
    if fp8 {
        let adds: Vec<&str> = sass.lines().filter(|line| line.contains("FFMA")).collect();
        let kept = adds.iter().filter(|line| line.contains(".reuse")).count();
        assert!(3 * kept >= 2 * adds.len(), "{variant}: {kept} of {} additions keep their factor", adds.len());
        // Which registers sums and accumulators get changes with code that has nothing to do with them. FP32 output is for tests.
        let slow = adds.iter().filter(|line| in_one_bank(line)).count();
        let trains = !source.defines.contains(&("OUT_FP32", "1".into()));
        assert!(!trains || 20 * slow <= adds.len(), "{variant}: {slow} of {} additions read three registers of one bank", adds.len());
    }
    true
}

#[test]
fn every_kernel_compiles_without_spills() {
    let Some(folder) = folder() else {
        return println!("SKIPPED every_kernel_compiles_without_spills: no NVRTC");
    };
    let cache = scratch("cubins");
    let jit = Jit::load(Some(&folder), &cache).expect("NVRTC is there");
    let fused =
        [quantise::sources(), rms_norm::sources(), swiglu::sources(), adamw::sources(), checksum::sources(), gradient_norm::sources()];
    let others = [attention::sources(), wide_linear::sources(), unpermute::sources(), cross_entropy::sources(), mla_heads::sources(), normal::sources(), routes::sources(), gate::sources(), gemm_fp8::sources()];
    let sources: Vec<_> = fused.into_iter().chain(others).flatten().collect();
    let num_seen = sources.iter().filter(|source| check(&folder, &jit, &cache, source)).count();
    println!("{} kernels compiled, {num_seen} disassembled", sources.len());
    if !folder.join("../bin/cuobjdump").exists() {
        println!("SKIPPED every_kernel_compiles_without_spills, the look into them: no cuobjdump");
    } else {
        assert_eq!(num_seen, sources.len(), "cuobjdump reads every kernel");
    }
    assert_eq!(std::fs::read_dir(&cache).expect("the cache is there").count(), sources.len() + 1, "one file a variant");
    std::fs::remove_dir_all(&cache).expect("the cache is ours");
}

#[test]
fn the_cache_is_whole_or_absent() {
    let Some(folder) = folder() else {
        return println!("SKIPPED the_cache_is_whole_or_absent: no NVRTC");
    };
    let cache = scratch("cache");
    let text = "extern \"C\" __global__ void k(float* x) { x[threadIdx.x] = N; }";
    let source = |n: &str| Source { name: "k", text: text.into(), defines: vec![("N", n.into())] };
    // Many at once: all get the same bytes, one file is left.
    let load = || Jit::load(Some(&folder), &cache).expect("NVRTC is there").cubin(&source("1")).expect("it compiles");
    let first = load();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
        all.into_iter().for_each(|one| assert_eq!(one.join().expect("no panic"), first));
    });
    let files = || -> Vec<PathBuf> { std::fs::read_dir(&cache).unwrap().map(|file| file.unwrap().path()).collect() };
    assert_eq!(files().len(), 1);
    // A damaged file is compiled anew and replaced.
    let file = files().remove(0);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(load(), first);
    assert_eq!(std::fs::read(&file).unwrap(), whole);
    // Another kernel's file is none of this one's.
    let other = source("3");
    let jit = Jit::load(Some(&folder), &cache).expect("NVRTC is there");
    jit.cubin(&other).expect("it compiles");
    let theirs = files().into_iter().find(|path| *path != file).expect("two files");
    std::fs::copy(&theirs, &file).unwrap();
    assert_eq!(load(), first);
    std::fs::remove_file(theirs).unwrap();
    // Where nothing can be kept, what was compiled serves all the same.
    let below_a_file = Jit::load(Some(&folder), &file.join("cache")).expect("NVRTC is there");
    assert_eq!(below_a_file.cubin(&source("1")).expect("it compiles"), first);
    // Another definition is another file; an error names the kernel and the line.
    assert_ne!(jit.cubin(&source("2")).unwrap(), first);
    assert_eq!(files().len(), 2);
    let Err(JitError::Compile { name, log }) = jit.cubin(&source("nonsense")) else { panic!("nonsense compiled") };
    assert!(name == "k" && log.contains("nonsense"), "{log}");
    std::fs::remove_dir_all(&cache).expect("the cache is ours");
}
