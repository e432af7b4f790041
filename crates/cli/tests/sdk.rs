//! The official KubeMQ SDKs, unmodified, against a freshly started `polymq broker`: one process of each for every case.
//!
//! The cases are in `tests/sdk/`, one program an SDK, which lists its cases itself. `scripts/sdks install` puts the
//! SDKs where they are looked for; without them each is one failed case that says so.

mod common;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use common::{Broker, wait};
use libtest_mimic::{Arguments, Failed, Trial};

/// No case takes half of it on a busy machine; one that hangs must not stop the others.
const LONGEST: Duration = Duration::from_secs(300);
/// Most of them wait most of the time.
const AT_A_TIME: usize = 4;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    let sdks = env::var_os("POLYMQ_SDKS_DIR").map_or_else(|| root().join("target/sdks"), PathBuf::from);
    let cases = root().join("crates/cli/tests/sdk");
    let python = |version: &str, script: &str| Sdk {
        program: sdks.join(format!("python-{version}/bin/python")),
        script: Some(cases.join(script)),
    };
    let programs = [
        ("python2", python("2.4.0", "python2.py")),
        ("python4", python("4.1.5", "python4.py")),
        ("javascript", Sdk { program: sdks.join("javascript/run"), script: Some(cases.join("javascript.js")) }),
        ("rust", Sdk { program: sdks.join("rust/debug/kubemq-sdk-cases"), script: None }),
    ];
    let trials = programs.into_iter().flat_map(|(name, sdk)| match sdk.cases() {
        Ok(cases) => cases
            .into_iter()
            .map(|case| {
                let sdk = sdk.clone();
                Trial::test(format!("{name}::{case}"), move || sdk.run(&case))
            })
            .collect(),
        Err(why) => vec![Trial::test(format!("{name}::is_installed"), move || Err(why.into()))],
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A program that uses an SDK.
#[derive(Clone)]
struct Sdk {
    program: PathBuf,
    script: Option<PathBuf>,
}

impl Sdk {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.script).env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null());
        command
    }

    /// The names of its cases.
    fn cases(&self) -> Result<Vec<String>, String> {
        let missing = |why: String| format!("{} {why}: run scripts/sdks install", self.program.display());
        let output =
            self.command().arg("--list").output().map_err(|cause| missing(format!("cannot be run ({cause})")))?;
        let names: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        if !output.status.success() || names.is_empty() {
            return Err(missing(format!("lists no cases: {}", String::from_utf8_lossy(&output.stderr))));
        }
        Ok(names)
    }

    /// Runs one case against a broker of its own, which must end well afterwards.
    fn run(&self, case: &str) -> Result<(), Failed> {
        let folder = tempfile::tempdir()?;
        let data = folder.path().join("data");
        let mut broker = Broker::start(folder.path(), &["--data-dir", &data.to_string_lossy()])?;
        let said = folder.path().join("case.log");
        let log = fs::File::create(&said)?;
        let mut command = self.command();
        command.args([&broker.address, case]).stdout(log.try_clone()?).stderr(log);
        // A case may kill the broker; then it comes again.
        let mut process = command.env("BROKER_PID", broker.id().to_string()).spawn()?;
        let until = Instant::now() + LONGEST;
        let ended = loop {
            if let Some(status) = wait(&mut process, Duration::from_millis(50)) {
                break Some(status);
            }
            broker.keep_up()?;
            if Instant::now() > until {
                process.kill()?;
                process.wait()?;
                break None;
            }
        };
        let stopped = broker.stop("TERM");
        let tell = |what: &str| {
            let said = fs::read_to_string(&said).unwrap_or_default();
            Err(Failed::from(format!("{what}\n--- the case said:\n{said}--- the broker said:\n{}", broker.logs())))
        };
        match (ended, stopped) {
            (None, _) => tell(&format!("the case did not end within {LONGEST:?}")),
            (Some(status), _) if !status.success() => tell(&format!("the case failed ({status})")),
            (_, None) => tell("the broker did not end after SIGTERM"),
            (_, Some(status)) if !status.success() => tell(&format!("the broker ended with {status}")),
            _ if broker.logs().contains("ERROR") => tell("the broker logged an error"),
            _ => Ok(()),
        }
    }
}
