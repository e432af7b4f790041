//! Events, commands and queries: see `polymq_fuzz::events`.
#![no_main]

libfuzzer_sys::fuzz_target!(|steps: Vec<polymq_fuzz::events::Step>| polymq_fuzz::events::run(&steps));
