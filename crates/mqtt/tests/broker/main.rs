//! What is special about MQTT, against a real Mosquitto. The contract that all backends share is in the
//! conformance suite.

#[path = "../harness/mod.rs"]
mod harness;

mod basics;
mod closing;
mod forgotten;
mod killed;
mod left_behind;
mod outages;
mod retries;
mod runtimes;
mod sharing;
mod waiting;
mod words;
