//! The committed code is what the interface definition gives.

use std::{fs, path::Path};

#[test]
fn generated_code_is_up_to_date() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().expect("a folder");
    let descriptors = protox::compile(["kubemq.proto"], [here.join("proto")]).expect("the definition compiles");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .bytes(".")
        .build_transport(false)
        .compile_fds(descriptors)
        .expect("code is generated");
    let fresh = fs::read_to_string(out.path().join("kubemq.rs")).expect("the generated file");
    let committed = here.join("src/generated.rs");
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        fs::write(&committed, &fresh).expect("written");
    }
    assert!(
        fs::read_to_string(committed).expect("the committed file") == fresh,
        "run UPDATE_GENERATED=1 cargo test -p polymq-kubemq-proto --test generated"
    );
}
