//! An instance of a broker for this run, by `scripts/brokers`.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

pub struct Broker {
    kind: &'static str,
    port: u16,
    folder: PathBuf,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/brokers")
}

impl Broker {
    pub fn start(kind: &'static str) -> Result<Self, String> {
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .map_err(|e| e.to_string())?
            .port();
        let folder = std::env::temp_dir().join(format!("polymq-bench-{kind}-{}", std::process::id()));
        let mut command = Command::new(script());
        command.args(["up", kind, "--port", &port.to_string(), "--dir"]).arg(&folder);
        if kind == "mosquitto" {
            command.arg("--volatile");
        }
        let broker = Self { kind, port, folder };
        let output = command.output().map_err(|error| format!("scripts/brokers: {error}"))?;
        if !output.status.success() {
            return Err(format!("{kind} does not start: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        Ok(broker)
    }

    pub fn url(&self) -> String {
        match self.kind {
            "rabbitmq" => format!("amqp://127.0.0.1:{}", self.port),
            _ => format!("mqtt://127.0.0.1:{}", self.port),
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = Command::new(script()).args(["down", "--now", "--dir"]).arg(&self.folder).output();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
