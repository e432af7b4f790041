//! Any bytes as any request: see `polymq_fuzz::requests`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| polymq_fuzz::requests::run(bytes));
