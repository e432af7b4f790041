//! The life of messages in queues: see `polymq_fuzz::queues`.
#![no_main]

libfuzzer_sys::fuzz_target!(|steps: Vec<polymq_fuzz::queues::Step>| polymq_fuzz::queues::run(&steps));
