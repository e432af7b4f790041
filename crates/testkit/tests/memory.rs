//! The suite on the memory backend: the reference passes every case that needs no broker.

use std::{net::SocketAddr, process::ExitCode, sync::Arc};

use polymq_core::{Backend, memory::MemoryBackend};
use polymq_testkit::{Clock, Harness, Suite};

#[derive(Debug)]
struct Memory;

impl Harness for Memory {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(MemoryBackend)
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        "memory://conformance".into()
    }

    fn clock(&self) -> Clock {
        Clock::Paused
    }
}

fn main() -> ExitCode {
    Suite::new("memory", |_| Memory).in_process("there is no broker and no wire").and_mutants().main()
}
