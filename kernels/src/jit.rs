//! CUDA text → cubin for sm_90a through NVRTC, kept in a directory that many processes share.
//!
//! Invariant: a file of the cache is whole or absent. Its name is the hash of everything that went into it
//! (text, options, the compiler's build), it is written aside, fsynced and renamed, and it ends in a hash of itself.
//! NVRTC is loaded at run time and needs no GPU, so the tests compile every kernel anywhere.
#![allow(unsafe_code)]
use crate::sass;
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::ffi::{CString, c_char, c_int, c_void};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::ptr;

// Texts are shared, and not every kernel uses every function of theirs (177).
const OPTIONS: [&str; 4] = ["--gpu-architecture=sm_90a", "--std=c++17", "-lineinfo", "--diag-suppress=177"];
const HASH_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum JitError {
    #[error("NVRTC is not there: {0}")]
    Missing(String),
    #[error("{name} does not compile:\n{log}")]
    Compile { name: String, log: String },
    #[error("NVRTC error {code} in {call}")]
    Nvrtc { call: &'static str, code: c_int },
}

/// One compilation: a text and its `-D` definitions.
pub struct Source {
    pub name: &'static str,
    pub text: String,
    pub defines: Vec<(&'static str, String)>,
}

type Program = *mut c_void;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

struct Api {
    create: Symbol<
        unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int,
    >,
    compile: Symbol<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int>,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> c_int>,
    log_size: Symbol<GetSize>,
    log: Symbol<GetBytes>,
    cubin_size: Symbol<GetSize>,
    cubin: Symbol<GetBytes>,
    _library: Library,
}

pub struct Jit {
    api: Api,
    version: (c_int, c_int),
    /// Of the compiler's file: builds of one version differ.
    build: String,
    cache: PathBuf,
}

impl Jit {
    /// `library`: the folder of libnvrtc.so.13, or None to search where the loader does and beside CUDA's runtime.
    pub fn load(library: Option<&Path>, cache: &Path) -> Result<Jit, JitError> {
        let mut folders: Vec<PathBuf> = library.map(Path::to_path_buf).into_iter().collect();
        folders.extend(folder_of_loaded("libcudart.so"));
        folders.push(PathBuf::new());
        let mut why = String::new();
        for folder in folders {
            match Api::load(&folder) {
                Ok((api, version)) => return Ok(Jit { api, version, build: build(), cache: cache.to_path_buf() }),
                Err(error) => why += &format!("{}{error}", if why.is_empty() { "" } else { "; " }),
            }
        }
        Err(JitError::Missing(why))
    }

    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The cubin of `source`, compiled at most once for all processes that share the cache (a race costs a compile).
    pub fn cubin(&self, source: &Source) -> Result<Vec<u8>, JitError> {
        let path = self.cache.join(format!("{}-{}.cubin", source.name, self.key(source)));
        if let Some(cubin) = read_whole(&path) {
            return Ok(cubin);
        }
        let mut cubin = self.compile(source)?;
        if let Some((_, turn)) = source.defines.iter().find(|(name, _)| *name == sass::KEEP_FACTORS) {
            sass::keep_factors(&mut cubin, turn.parse().expect("a number of instructions"));
        }
        if let Err(error) = write_aside(&path, &cubin) {
            tracing::warn!("{} is not kept, and is compiled anew by the next run: {error}", path.display());
        }
        Ok(cubin)
    }

    fn key(&self, source: &Source) -> String {
        let mut hasher = blake3::Hasher::new();
        // Lengths go in too: otherwise a letter could wander from one part to its neighbour.
        let mut part = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        part(&format!("{:?} {}", self.version, self.build));
        options(source).iter().for_each(|option| part(option));
        part(&source.text);
        if source.defines.iter().any(|(name, _)| *name == sass::KEEP_FACTORS) {
            part(include_str!("sass.rs")); // what it does to the code goes in too
        }
        hasher.finalize().to_hex().to_string()
    }

    fn compile(&self, source: &Source) -> Result<Vec<u8>, JitError> {
        let text = CString::new(source.text.as_str()).expect("a CUDA text has no zero byte");
        let name = CString::new(format!("{}.cu", source.name)).expect("a name has no zero byte");
        let options: Vec<CString> =
            options(source).into_iter().map(|o| CString::new(o).expect("an option has no zero byte")).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program: Program = ptr::null_mut();
        // SAFETY: all strings are zero-terminated and outlive the calls; no headers are passed.
        check("nvrtcCreateProgram", unsafe {
            (self.api.create)(&mut program, text.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null())
        })?;
        // SAFETY: `program` was made above; the options are as many as we say.
        let code = unsafe { (self.api.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        let result = self.bytes(program, "nvrtcGetProgramLog", &self.api.log_size, &self.api.log).and_then(|log| {
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
            if code != 0 {
                return Err(JitError::Compile { name: source.name.to_string(), log });
            }
            if !log.is_empty() {
                tracing::warn!("{} compiles, but not as it should:\n{log}", source.name); // matrix instructions one by one, for one
            }
            self.bytes(program, "nvrtcGetCUBIN", &self.api.cubin_size, &self.api.cubin)
        });
        // SAFETY: `program` is destroyed once, here.
        check("nvrtcDestroyProgram", unsafe { (self.api.destroy)(&mut program) })?;
        result
    }

    fn bytes(
        &self,
        program: Program,
        call: &'static str,
        size: &Symbol<GetSize>,
        get: &Symbol<GetBytes>,
    ) -> Result<Vec<u8>, JitError> {
        let mut len = 0;
        // SAFETY: a live program and a place for one number.
        check(call, unsafe { size(program, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: the buffer has the length that NVRTC just named.
        check(call, unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Api {
    fn load(folder: &Path) -> Result<(Api, (c_int, c_int)), libloading::Error> {
        // The builtins are searched by bare name at compile time: they must be in the process by then.
        if let Ok(builtins) = open(&folder.join("libnvrtc-builtins.so.13.0")) {
            std::mem::forget(builtins);
        }
        let library = open(&folder.join("libnvrtc.so.13"))?;
        // SAFETY: the names and types are those of nvrtc.h, CUDA 13; the library is kept beside the symbols.
        unsafe {
            let version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> = library.get(b"nvrtcVersion")?;
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            let api = Api {
                create: library.get(b"nvrtcCreateProgram")?,
                compile: library.get(b"nvrtcCompileProgram")?,
                destroy: library.get(b"nvrtcDestroyProgram")?,
                log_size: library.get(b"nvrtcGetProgramLogSize")?,
                log: library.get(b"nvrtcGetProgramLog")?,
                cubin_size: library.get(b"nvrtcGetCUBINSize")?,
                cubin: library.get(b"nvrtcGetCUBIN")?,
                _library: library,
            };
            Ok((api, (major, minor)))
        }
    }
}

fn options(source: &Source) -> Vec<String> {
    let defines = source.defines.iter().map(|(name, value)| format!("-D{name}={value}"));
    OPTIONS.iter().map(|o| o.to_string()).chain(defines).collect()
}

fn check(call: &'static str, code: c_int) -> Result<(), JitError> {
    if code == 0 { Ok(()) } else { Err(JitError::Nvrtc { call, code }) }
}

/// Loads a library for the whole process: what is loaded later finds its symbols.
pub(crate) fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: only NVIDIA's and libtorch's libraries are opened here; their initialisers are meant to run in any thread.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }
}

/// What tells the loaded compiler's file from others: its length, and where its build is named.
fn build() -> String {
    const ENDS: u64 = 64 << 10;
    let ends = || -> io::Result<String> {
        let name = "libnvrtc.so.13";
        let mut file = File::open(folder_of_loaded(name).unwrap_or_default().join(name))?;
        let length = file.metadata()?.len();
        let mut bytes = Vec::new();
        (&mut file).take(ENDS).read_to_end(&mut bytes)?;
        file.seek(SeekFrom::Start(length.saturating_sub(ENDS)))?;
        file.read_to_end(&mut bytes)?;
        Ok(format!("{length} {}", blake3::hash(&bytes)))
    };
    ends().unwrap_or_default()
}

/// The folder of a library that is loaded already and whose file name starts with `name`.
pub(crate) fn folder_of_loaded(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let path = maps
        .lines()
        .filter_map(|line| Some(Path::new(&line[line.find('/')?..])))
        .find(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name)))?;
    path.parent().map(Path::to_path_buf)
}

/// None where the file is absent, or its last bytes are not the hash of its name and the rest.
fn read_whole(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let hash = bytes.split_off(bytes.len().checked_sub(HASH_BYTES)?);
    (hash_of(path, &bytes)[..] == hash[..]).then_some(bytes)
}

fn hash_of(path: &Path, bytes: &[u8]) -> [u8; HASH_BYTES] {
    let name = path.file_name().expect("a cache file has a name").as_encoded_bytes();
    *blake3::Hasher::new().update(name).update(bytes).finalize().as_bytes()
}

fn write_aside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().expect("a cache file lies in a folder");
    fs::create_dir_all(folder)?;
    // Containers of several hosts may share the folder, and have equal host names and process ids.
    let unique = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let aside = folder.join(format!(".{}", unique.trim()));
    let write = || {
        let mut file = File::create_new(&aside)?;
        file.write_all(bytes)?;
        file.write_all(&hash_of(path, bytes))?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    if let Err(error) = write() {
        let _ = fs::remove_file(&aside);
        return Err(error);
    }
    File::open(folder)?.sync_all()
}
