//! Compiles `proto/` without `protoc`, and keeps the descriptors for
//! reflection.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let files = protox::Compiler::new(["proto"])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(["fileaccess/v1/file_access.proto", "fileaccess/v1/error_reason.proto"])?
        .file_descriptor_set();
    // `compile_fds` ignores `file_descriptor_set_path`, so the file that
    // reflection serves is written here.
    std::fs::write(out.join("fileaccess.fds"), files.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .btree_map(".fileaccess.v1")
        .extern_path(".google.rpc.Status", "::tonic_types::Status")
        .compile_fds(files)?;
    Ok(())
}
