//! One program, which knows no backend, on each of them (mission rows A1, C13 and J11): nothing but its environment differs.
#![cfg(all(
    unix,
    feature = "amqp",
    feature = "embedded",
    feature = "http",
    feature = "kafka",
    feature = "kubemq",
    feature = "macros",
    feature = "mqtt",
    feature = "sqs"
))]
#![allow(missing_docs)]

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc,
    time::Duration,
};

use polymq::prelude::*;
use polymq_testkit::{Broker, BrokerControl, free_port};

const PATIENCE: Duration = Duration::from_secs(90);
/// Tells the child process to be the program.
const PROGRAM: &str = "PROGRAM_UNDER_TEST";

#[consumer("echo")]
async fn echo(text: String) {
    println!("\necho: {text}");
}

/// The program: it knows no backend.
async fn program(bus: Bus) -> Result<()> {
    bus.queue("echo").send(&"hello").await?;
    Ok(())
}

/// Not a test: what the child process runs.
#[test]
fn child() {
    if std::env::var_os(PROGRAM).is_some() {
        let code = polymq::run(program);
        std::process::exit(i32::from(code != ExitCode::SUCCESS));
    }
}

/// The program as a process.
struct Program {
    process: Child,
    printed: mpsc::Receiver<String>,
}

impl Program {
    /// On the backend of this name; nothing but the environment differs.
    fn start(backend: &str, url: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["child", "--exact", "--nocapture"]).env(PROGRAM, "1");
        command.env("POLYMQ_BACKEND", backend).env("POLYMQ_URL", url);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(|line| line.ok());
        let (sender, printed) = mpsc::channel();
        std::thread::spawn(move || lines.into_iter().all(|line| sender.send(line).is_ok()));
        Self { process, printed }
    }

    fn prints(&self, expected: &str) {
        while self.printed.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{expected:?} was not printed")) != expected
        {
        }
    }

    /// The time that processors have spent on it, in ticks of 10 ms.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    fn ends_in_order(mut self) {
        let told = Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status().unwrap();
        assert!(told.success());
        let mut told = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        // A broker that stands still for longer than closing waits is told of; the program has ended all the same.
        let is_late = |line: &str| line.contains("in time") || line.contains("within");
        let gave_up = told.lines().any(|line| line.starts_with("error: ") && line.contains("close") && is_late(line));
        let code = self.process.wait().unwrap().code();
        assert!(code == Some(0) || code == Some(1) && gave_up, "{code:?}: {told}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // After a failed assertion; it has ended otherwise.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(mut told) = self.process.stderr.take() {
            let _ = std::io::copy(&mut told, &mut std::io::stderr());
        }
    }
}

/// The same binary on each backend, chosen by one variable; then each of them idles and must cost nothing.
#[test]
fn a1_c13_one_binary_runs_on_each_backend_and_idles_for_free() {
    const WATCHED: u64 = 30;
    let (rabbitmq, mosquitto) = (Broker::rabbitmq(), Broker::mosquitto(&[]));
    let (kafka, sqs) = (Broker::kafka(), Broker::sqs("ministack"));
    let (runtime, data) = (tokio::runtime::Runtime::new().unwrap(), tempfile::tempdir().unwrap());
    let kubemq = polymq_broker::Broker::builder().listen("127.0.0.1:0").data_dir(data.path().join("kubemq"));
    let kubemq = runtime.block_on(kubemq.start()).unwrap();
    // All of them start at once, right after their brokers.
    let patient = "?connect_timeout=60s";
    let urls = [
        ("memory", "memory://".to_owned()),
        ("amqp", format!("amqp://{}{patient}", rabbitmq.address())),
        ("mqtt", format!("mqtt://{}{patient}&operation_timeout=60s", mosquitto.address())),
        ("kafka", format!("kafka://admin:secret@{}{patient}", kafka.address())),
        ("sqs", format!("sqs://test:test@{}{patient}", sqs.address())),
        ("http", format!("http://127.0.0.1:{}", free_port())),
        ("kubemq", format!("kubemq://{}{patient}", kubemq.address())),
        ("embedded", format!("embedded://{}", data.path().join("embedded").display())),
    ];
    let programs = urls.map(|(backend, url)| (backend, Program::start(backend, &url)));
    for (_, program) in &programs {
        program.prints("echo: hello");
    }
    std::thread::sleep(Duration::from_secs(2)); // what starting costs is not counted
    // The best of three: on a crowded machine the same work takes more ticks.
    let mut used = programs.each_ref().map(|_| u64::MAX);
    for _ in 0..3 {
        let before = programs.each_ref().map(|(_, program)| program.ticks());
        std::thread::sleep(Duration::from_secs(WATCHED));
        for ((least, before), (_, program)) in used.iter_mut().zip(before).zip(&programs) {
            *least = (program.ticks() - before).min(*least);
        }
        if used.iter().all(|used| *used < WATCHED) {
            break;
        }
    }
    let used: Vec<_> = programs.iter().zip(used).map(|((backend, _), used)| (*backend, used)).collect();
    println!("hundredths of a second in {WATCHED} s: {used:?}");
    for (backend, used) in used {
        assert!(
            used < WATCHED,
            "{backend}: {used} ticks of 10 ms in {WATCHED} idle seconds are 1 % of a processor or more"
        );
    }
    for (_, program) in programs {
        program.ends_in_order();
    }
    runtime.block_on(kubemq.stop());
}
