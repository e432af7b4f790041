//! `polymq broker` as a process of a test.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// How long a broker may take to end.
const ENDS: Duration = Duration::from_secs(60);

/// A broker on a port of its own. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Broker {
    process: Child,
    options: Vec<String>,
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
        Self::start_under(Command::new(env!("CARGO_BIN_EXE_polymq")), folder, options)
    }

    /// As [`Broker::start`], by a command that becomes the broker when the broker's options are added.
    pub(crate) fn start_under(command: Command, folder: &Path, options: &[&str]) -> Result<Self, String> {
        let options = options.iter().map(ToString::to_string).collect();
        // A port that it gets again after a crash.
        let address = format!("127.0.0.1:{}", polymq_testkit::free_port());
        Self::listen(command, &address, folder.join("broker.log"), options)
    }

    fn listen(mut command: Command, address: &str, log: PathBuf, options: Vec<String>) -> Result<Self, String> {
        let stderr = fs::OpenOptions::new().create(true).append(true).open(&log).map_err(|cause| cause.to_string())?;
        let process = command
            .args(["--json", "--log", "info", "broker", "--listen", address])
            .args(&options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn();
        let process = process.map_err(|cause| cause.to_string())?;
        let mut broker = Self { process, options, address: String::new(), line: String::new(), log };
        if let Some(stdout) = broker.process.stdout.take() {
            BufReader::new(stdout).read_line(&mut broker.line).map_err(|cause| cause.to_string())?;
        }
        let said = serde_json::from_str::<serde_json::Value>(&broker.line);
        let said = said.map_err(|_| format!("the broker did not start: {}", broker.logs()))?;
        broker.address = said["listening"].as_str().unwrap_or_default().to_owned();
        Ok(broker)
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Starts it again where it was, when it has ended.
    pub(crate) fn keep_up(&mut self) -> Result<(), String> {
        if let Ok(Some(_)) = self.process.try_wait() {
            let command = Command::new(env!("CARGO_BIN_EXE_polymq"));
            *self = Self::listen(command, &self.address, self.log.clone(), self.options.clone())?;
        }
        Ok(())
    }

    /// What it logged.
    pub(crate) fn logs(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: &str) -> Option<()> {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.process.id().to_string()]).status();
        sent.ok().filter(ExitStatus::success).map(drop)
    }

    /// Sends a signal and tells how it ends, or nothing when it does not.
    pub(crate) fn stop(&mut self, signal: &str) -> Option<ExitStatus> {
        self.signal(signal)?;
        self.ends()
    }

    /// How it ends by itself, or nothing when it does not.
    pub(crate) fn ends(&mut self) -> Option<ExitStatus> {
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

/// How a process ends, when it does within a time.
pub(crate) fn wait(process: &mut Child, longest: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + longest;
    loop {
        if let Ok(Some(status)) = process.try_wait() {
            return Some(status);
        }
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
