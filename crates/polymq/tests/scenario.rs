//! X7: one scenario and one program, on every backend; what came of it is compared with what comes of it in memory, line
//! by line. Only differences that a declared capability explains are allowed, and each of them is printed with it.
//!
//! The program is this binary started anew: nothing but `POLYMQ_BACKEND` and `POLYMQ_URL` tells it where it runs. Over
//! HTTP nobody stands between sender and consumer, so the sender there is the one of the HTTP crate's own suite, which
//! keeps what was not taken.
//!
//! X6 beside it: shapes that servers refuse, tried on each backend and on memory that stands for it.

#[path = "../../http/tests/conformance/kept.rs"]
mod kept;
#[path = "scenario/play.rs"]
mod play;
#[path = "scenario/shapes.rs"]
mod shapes;
#[path = "scenario/step.rs"]
mod step;

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, ExitCode},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use play::Played;
use polymq_testkit::{Broker, BrokerControl};
use step::{Scenario, Step};

/// Tells the program where to write what came of it.
const OUTCOME: &str = "POLYMQ_TEST_OUTCOME";
/// Tells the program to try shapes and nothing else.
const SHAPES: &str = "POLYMQ_TEST_SHAPES";
/// How long a backend may take for all of it.
const LIMIT: Duration = Duration::from_secs(480);

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(OUTCOME) {
        program(Path::new(&path));
        return ExitCode::SUCCESS;
    }
    let trials = vec![
        Trial::test("x7_one_scenario_one_program_every_backend", every_backend),
        Trial::test("x7_a_difference_that_nothing_explains_is_found", unexplained),
        Trial::test("x6_memory_refuses_what_each_server_refuses", strict_memory),
    ];
    let code = libtest_mimic::run(&Arguments::from_args(), trials).exit_code();
    // Nothing static is dropped, and brokers must be stopped.
    lock(&BROKERS).clear();
    lock(&OWN).take();
    code
}

/// The brokers of both tests, by the name of the backend; each is started once.
static BROKERS: Mutex<BTreeMap<&'static str, Arc<OnceLock<Broker>>>> = Mutex::new(BTreeMap::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the backend of this name is reached, with its broker running.
fn url(backend: &'static str) -> String {
    let broker = Arc::clone(lock(&BROKERS).entry(backend).or_default());
    let at = |start: fn() -> Broker| broker.get_or_init(start).address();
    // Connecting may take a while where all of them run at once.
    match backend {
        "mqtt" => format!("mqtt://{}?connect_timeout=60s&operation_timeout=60s", at(|| Broker::mosquitto(&[]))),
        "amqp" => format!("amqp://{}?connect_timeout=60s", at(Broker::rabbitmq)),
        "kafka" => format!("kafka://admin:secret@{}?session_timeout=45s&connect_timeout=60s", at(Broker::kafka)),
        "sqs" => format!("sqs://test:test@{}?poll_wait=1s&connect_timeout=60s", at(|| Broker::sqs("ministack"))),
        "kubemq" => {
            format!("kubemq://{}?connect_timeout=60s", lock(&OWN).get_or_insert_with(Own::start).broker.address())
        }
        "embedded" => format!("embedded://{}", lock(&OWN).get_or_insert_with(Own::start).folder().display()),
        own => format!("{own}://"),
    }
}

/// All but memory itself.
const BACKENDS: [&str; 7] = ["kept", "mqtt", "amqp", "kafka", "sqs", "kubemq", "embedded"];

/// polymq's own broker, in this process, and folders for those inside of programs: one folder a program.
struct Own {
    broker: polymq_broker::Broker,
    folders: Vec<tempfile::TempDir>,
    _runtime: tokio::runtime::Runtime,
}

static OWN: Mutex<Option<Own>> = Mutex::new(None);

impl Own {
    fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let data = tempfile::tempdir().expect("a folder");
        let builder = polymq_broker::Broker::builder().listen("127.0.0.1:0").data_dir(data.path());
        let broker = runtime.block_on(builder.start()).expect("the broker starts");
        Self { broker, folders: vec![data], _runtime: runtime }
    }

    fn folder(&mut self) -> &Path {
        self.folders.push(tempfile::tempdir().expect("a folder"));
        self.folders.last().expect("just made").path()
    }
}

/// The same for each backend, at the same time.
fn on_each<T: Send>(backends: &[&'static str], run: impl Fn(&'static str) -> T + Sync) -> Vec<(&'static str, T)> {
    std::thread::scope(|scope| {
        let run = &run;
        let running: Vec<_> = backends.iter().map(|backend| (*backend, scope.spawn(move || run(backend)))).collect();
        let ended = |(backend, run): (&'static str, std::thread::ScopedJoinHandle<'_, T>)| {
            (if backend == "kept" { "http" } else { backend }, run.join().expect("no panic"))
        };
        running.into_iter().map(ended).collect()
    })
}

fn program(path: &Path) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let outcome = runtime.block_on(async {
        if std::env::var_os(SHAPES).is_some() {
            let bus = polymq::Bus::from_env().await.expect("connect");
            return serde_json::to_string(&shapes::try_all(&bus).await);
        }
        serde_json::to_string(&play::play(&Scenario::read()).await.unwrap_or_else(|error| panic!("{error}")))
    });
    std::fs::write(path, outcome.expect("text")).expect("the outcome is written");
}

/// Runs the program on one backend and gives what it has written.
fn run_program<T: serde::de::DeserializeOwned>(backend: &str, url: &str, shapes: bool) -> Result<T, String> {
    let outcome = tempfile::NamedTempFile::new().expect("a file").into_temp_path();
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.env("POLYMQ_BACKEND", backend).env("POLYMQ_URL", url).env(OUTCOME, &outcome);
    if shapes {
        command.env(SHAPES, "1");
    }
    let mut process = command.spawn().expect("it starts");
    let started = Instant::now();
    let status = loop {
        match process.try_wait().expect("it is ours") {
            Some(status) => break status,
            None if started.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(50)),
            None => {
                process.kill().and_then(|()| process.wait()).expect("it is ours");
                return Err(format!("not done within {LIMIT:?}"));
            }
        }
    };
    if !status.success() {
        return Err(format!("the program ended with {status}"));
    }
    let text = std::fs::read_to_string(&outcome).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

fn every_backend() -> Result<(), Failed> {
    let scenario = Scenario::read();
    let backends: Vec<_> = ["memory"].into_iter().chain(BACKENDS).collect();
    let mut wrong = Vec::new();
    for (name, played) in on_each(&backends, |backend| run_program::<Played>(backend, &url(backend), false)) {
        match played {
            Ok(played) => {
                let compared = Compared::new(&scenario, &played);
                println!("summary of x7 on {name}: {compared}");
                wrong.extend(compared.unexplained.into_iter().map(|line| format!("{name}: {line}")));
            }
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failed::from(wrong.join("\n"))) }
}

/// Whatever a server refuses, memory refuses that stands for it, and says the same kind of error where both know before
/// sending.
fn strict_memory() -> Result<(), Failed> {
    type Told = BTreeMap<String, String>;
    let outcomes = on_each(&BACKENDS, |backend| {
        let like = if backend == "kept" { "http" } else { backend };
        let memory = run_program::<Told>("memory", &format!("memory://like-{like}?like={like}"), true)?;
        Ok::<_, String>((run_program::<Told>(backend, &url(backend), true)?, memory))
    });
    let mut wrong = Vec::new();
    for (name, outcome) in outcomes {
        let (server, memory) = match outcome {
            Ok(both) => both,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        let refused = |told: &Told| told.values().filter(|outcome| *outcome != "taken").count();
        println!(
            "summary of x6 on {name}: {} shapes, {} refused, {} by memory that stands for it",
            server.len(),
            refused(&server),
            refused(&memory)
        );
        for (shape, outcome) in server.iter().filter(|(_, outcome)| *outcome != "taken") {
            if outcome == shapes::NO_ANSWER {
                wrong.push(format!("{name} gives no answer to {shape}"));
                continue;
            }
            if name == "kafka" && shape.contains("a_b") {
                // Kafka refuses a name that another topic has but for `.` and `_`: no name is wrong by itself.
                println!("  {shape}: refused for the sake of another topic ({outcome})");
                continue;
            }
            if memory.get(shape).is_none_or(|told| told == "taken") {
                wrong.push(format!("{name} refuses {shape} ({outcome}), memory like it takes it"));
            }
        }
        assert!(server.len() == memory.len() && refused(&server) > 10, "{name}: {server:?}");
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failed::from(wrong.join("\n"))) }
}

/// What came of the scenario beside what had to come.
#[derive(Debug, Default)]
struct Compared {
    lines: usize,
    explained: Vec<String>,
    unexplained: Vec<String>,
}

impl Compared {
    fn new(scenario: &Scenario, played: &Played) -> Self {
        let mut compared = Self::default();
        for step in &scenario.step {
            compared.step(step, &played.declared, played.steps.get(&step.name).map_or(&[], Vec::as_slice));
        }
        compared
    }

    fn step(&mut self, step: &Step, declared: &BTreeMap<String, String>, lines: &[String]) {
        let (expected, capability) = step.expected(declared);
        let [mut memory, mut expected, mut lines] = [&step.memory, expected, lines].map(<[String]>::to_vec);
        [&mut memory, &mut expected, &mut lines].into_iter().for_each(|lines| lines.sort());
        self.lines += expected.len();
        if let Some(capability) = capability {
            let differs = |line: &&String| !memory.contains(line);
            let differing: Vec<_> = expected.iter().filter(differs).map(String::as_str).collect();
            self.explained.push(format!("{} ({capability}): {}", step.name, differing.join(" | ")));
        }
        let lacking = expected.iter().filter(|line| !lines.contains(line)).map(|line| format!("not {line:?}"));
        let more = lines.iter().filter(|line| !expected.contains(line)).map(|line| format!("but {line:?}"));
        let differences: Vec<_> = lacking.chain(more).collect();
        if !differences.is_empty() {
            self.unexplained.push(format!("{}: {}", step.name, differences.join(", ")));
        } else if lines != expected {
            self.unexplained.push(format!("{}: {lines:?}, not {expected:?}", step.name));
        }
    }
}

impl std::fmt::Display for Compared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (lines, differ) = (self.lines, self.unexplained.len());
        write!(
            f,
            "{lines} lines compared with memory, {} steps differ as declared, {differ} otherwise",
            self.explained.len()
        )?;
        self.explained.iter().try_for_each(|explained| write!(f, "\n  {explained}"))
    }
}

/// The comparison itself: what is lost, comes twice, or differs with another reason than the declared one, is found.
fn unexplained() -> Result<(), Failed> {
    let scenario = Scenario::read();
    let step = |name: &str| scenario.step.iter().find(|step| step.name == name).expect("a step of the scenario");
    let found = |step: &Step, declared: &[(&str, &str)], lines: &[String]| {
        let declared = declared.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut compared = Compared::default();
        compared.step(step, &declared, lines);
        (compared.explained.len(), compared.unexplained.len())
    };
    let success = step("success");
    let mut changed = success.memory.clone();
    assert_eq!(found(success, &[], &changed), (0, 0), "the same lines");
    changed.push(changed[0].clone());
    assert_eq!(found(success, &[], &changed), (0, 1), "a line twice");
    changed.truncate(success.memory.len() - 1);
    assert_eq!(found(success, &[], &changed), (0, 1), "a line is missing");
    changed.push("s-1: ok@2".into());
    assert_eq!(found(success, &[], &changed), (0, 1), "another line");
    let groups = step("groups");
    let refused = ["refused: Unsupported".to_owned()];
    assert_eq!(found(groups, &[("groups", "no")], &refused), (1, 0), "declared");
    assert_eq!(found(groups, &[("groups", "yes")], &refused), (0, 1), "refused without having declared it");
    assert_eq!(found(groups, &[("groups", "no")], &groups.memory), (1, 1), "declared a no and did it all the same");
    Ok(())
}
