//! Builds the shim against libtorch's headers, where torch-sys finds the library too.
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=src/shim/shim.cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let torch = PathBuf::from(std::env::var_os("LIBTORCH").expect("LIBTORCH: .cargo/config.toml sets it; scripts/setup.sh makes it"));
    let include = torch.join("include");
    assert!(
        include.join("ATen").exists(),
        "{} has no ATen: LIBTORCH is a folder with include/ and lib/ (scripts/setup.sh)",
        include.display()
    );
    cc::Build::new().cpp(true).std("c++17").warnings(false).include(include).file("src/shim/shim.cpp").compile("tiefsee_shim");
}
