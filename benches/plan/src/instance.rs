//! A broker for this run: by `scripts/brokers`, or polymq's own, which a measured program serves itself.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::Broker;

/// A broker that runs; dropped, it is stopped and its data are gone.
pub struct Instance {
    folder: PathBuf,
    /// polymq's broker, or the script that starts another one.
    child: Option<Child>,
    /// Whether it is polymq's.
    own: bool,
    /// Where programs find it.
    pub url: String,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/brokers")
}

/// A port that nobody has.
fn free_port() -> Result<u16, String> {
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    address.map(|address| address.port()).map_err(|error| error.to_string())
}

impl Instance {
    /// Starts what a plan asks for; `program` is the measured program.
    pub fn start(program: &Path, broker: &Broker) -> Result<Self, String> {
        let port = free_port()?;
        let mut this = Self::prepare(broker, port);
        if this.own {
            this.serve(program, port)?;
            return this.wait(port);
        }
        // Stopped also when it does not come up.
        let output = this.launch(broker, port).output().map_err(|error| format!("scripts/brokers: {error}"))?;
        if !output.status.success() {
            let told = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " / ");
            return Err(format!("{} does not start: {told}", broker.kind));
        }
        Ok(this)
    }

    /// The same without waiting until it is ready, so that the caller can find out when it is.
    pub fn begin(program: &Path, broker: &Broker) -> Result<Self, String> {
        let port = free_port()?;
        let mut this = Self::prepare(broker, port);
        if this.own {
            this.serve(program, port)?;
        } else {
            let child = this.launch(broker, port).stdout(Stdio::null()).spawn();
            this.child = Some(child.map_err(|error| format!("scripts/brokers: {error}"))?);
        }
        Ok(this)
    }

    fn prepare(broker: &Broker, port: u16) -> Self {
        let name = format!("polymq-bench-{}-{}-{port}", broker.kind, std::process::id());
        let url = broker.url.replace("{port}", &port.to_string());
        Self { folder: std::env::temp_dir().join(name), child: None, own: broker.kind == Broker::POLYMQ, url }
    }

    fn launch(&self, broker: &Broker, port: u16) -> Command {
        let mut command = Command::new(script());
        command
            .args(["up", &broker.kind, "--port", &port.to_string(), "--dir"])
            .arg(&self.folder)
            .args(&broker.options);
        command
    }

    fn serve(&mut self, program: &Path, port: u16) -> Result<(), String> {
        let mut command = Command::new(program);
        command.arg("serve").arg(format!("127.0.0.1:{port}")).arg(self.folder.join("data"));
        let child = command.stdout(Stdio::null()).spawn().map_err(|error| error.to_string())?;
        let written = std::fs::create_dir_all(&self.folder)
            .and_then(|()| std::fs::write(self.folder.join("pid"), child.id().to_string()));
        self.child = Some(child);
        written.map_err(|error| error.to_string())
    }

    fn wait(mut self, port: u16) -> Result<Self, String> {
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || began.elapsed() > Duration::from_secs(20) {
                return Err(format!("polymq's broker does not start: {ended:?}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(self)
    }

    /// The process that serves, as soon as there is one.
    pub fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.folder.join("pid")).ok()?.trim().parse().ok()
    }

    /// Bytes on disk of everything that it keeps.
    pub fn disk(&self) -> u64 {
        fn size(path: &Path) -> u64 {
            let Ok(found) = path.symlink_metadata() else { return 0 };
            if !found.is_dir() {
                // As `du` counts: a file that was made longer than what is in it has no blocks there.
                return std::os::unix::fs::MetadataExt::blocks(&found) * 512;
            }
            let Ok(entries) = path.read_dir() else { return 0 };
            entries.flatten().map(|entry| size(&entry.path())).sum()
        }
        size(&self.folder.join("data"))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            if self.own {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
        if !self.own {
            let _ = Command::new(script()).args(["down", "--now", "--dir"]).arg(&self.folder).output();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
