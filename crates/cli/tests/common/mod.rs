//! `polymq broker` as a process of a test.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// How long a broker may take to end.
const ENDS: Duration = Duration::from_secs(20);

/// A broker on a free port. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Broker {
    process: Child,
    /// Where it listens.
    pub(crate) address: String,
    /// What it printed.
    pub(crate) line: String,
    /// Where its logs are.
    pub(crate) log: PathBuf,
}

impl Broker {
    /// Starts with these options; its logs go into a folder.
    pub(crate) fn start(folder: &Path, options: &[&str]) -> Result<Self, String> {
        let log = folder.join("broker.log");
        let stderr = fs::File::create(&log).map_err(|cause| cause.to_string())?;
        let process = Command::new(env!("CARGO_BIN_EXE_polymq"))
            .args(["--json", "--log", "info", "broker", "--listen", "127.0.0.1:0"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn();
        let mut broker = Self {
            process: process.map_err(|cause| cause.to_string())?,
            address: String::new(),
            line: String::new(),
            log,
        };
        if let Some(stdout) = broker.process.stdout.take() {
            BufReader::new(stdout).read_line(&mut broker.line).map_err(|cause| cause.to_string())?;
        }
        let said = serde_json::from_str::<serde_json::Value>(&broker.line);
        let said = said.map_err(|_| format!("the broker did not start: {}", broker.logs()))?;
        broker.address = said["listening"].as_str().unwrap_or_default().to_owned();
        Ok(broker)
    }

    /// What it logged.
    pub(crate) fn logs(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal and tells how it ends, or nothing when it does not.
    pub(crate) fn stop(&mut self, signal: &str) -> Option<ExitStatus> {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.process.id().to_string()]).status();
        sent.ok().filter(ExitStatus::success)?;
        wait(&mut self.process, ENDS)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Whatever is left of it; after an orderly end there is nothing to kill.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// How a process ends, within a time; afterwards it is killed.
pub(crate) fn wait(process: &mut Child, longest: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + longest;
    loop {
        if let Ok(Some(status)) = process.try_wait() {
            return Some(status);
        }
        if Instant::now() > until {
            let _ = process.kill();
            let _ = process.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
