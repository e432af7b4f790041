//! Queues and stored events across restarts: see `polymq_fuzz::restarts`.
#![no_main]

libfuzzer_sys::fuzz_target!(|steps: Vec<polymq_fuzz::restarts::Step>| polymq_fuzz::restarts::run(&steps));
