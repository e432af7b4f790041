//! The suite of polymq-testkit on the broker inside this process, with its data on disk.

use std::{net::SocketAddr, process::ExitCode, sync::Arc};

use polymq_core::{Address, Backend};
use polymq_embedded::EmbeddedBackend;
use polymq_testkit::{Harness, Suite};
use tempfile::TempDir;

#[derive(Debug)]
struct Inside {
    folder: TempDir,
    of_children: TempDir,
}

impl Harness for Inside {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(EmbeddedBackend)
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        format!("embedded://{}", self.folder.path().display())
    }

    /// A child is another process, which cannot have the same folder.
    fn child_environment(&self) -> Vec<(String, String)> {
        vec![("POLYMQ_TEST_CHILD_URL".into(), format!("embedded://{}", self.of_children.path().display()))]
    }

    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        vec![(Address::queue("a b"), "white space"), (Address::topic("a..b"), "two in a row")]
    }

    fn time_outs(&self) -> Vec<&'static str> {
        Vec::new()
    }
}

fn main() -> ExitCode {
    let folder = || tempfile::tempdir().expect("a folder");
    Suite::new("embedded", move |_| Inside { folder: folder(), of_children: folder() })
        .in_process("there is no broker and no wire")
        .main()
}
