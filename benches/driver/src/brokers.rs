//! An instance of a broker for this run, by `scripts/brokers`.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use crate::report::last_lines;

pub struct Broker {
    folder: PathBuf,
    /// Where programs find it.
    pub url: String,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/brokers")
}

impl Broker {
    pub fn start(broker: &plan::Broker) -> Result<Self, String> {
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .map_err(|e| e.to_string())?
            .port()
            .to_string();
        let folder = std::env::temp_dir().join(format!("polymq-bench-{}-{}", broker.kind, std::process::id()));
        let mut command = Command::new(script());
        command.args(["up", &broker.kind, "--port", &port, "--dir"]).arg(&folder).args(&broker.options);
        // Stopped also when it does not come up.
        let this = Self { folder, url: broker.url.replace("{port}", &port) };
        let output = command.output().map_err(|error| format!("scripts/brokers: {error}"))?;
        if !output.status.success() {
            return Err(format!("{} does not start: {}", broker.kind, last_lines(&output.stderr)));
        }
        Ok(this)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = Command::new(script()).args(["down", "--now", "--dir"]).arg(&self.folder).output();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
