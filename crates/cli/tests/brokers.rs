//! The command and the quickstart against real brokers: the same programs, told by a variable where to go.
#![cfg(all(feature = "amqp", feature = "mqtt"))]

use std::{
    io::{BufRead, BufReader},
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{OnceLock, mpsc},
    time::Duration,
};

use polymq_testkit::{Broker, BrokerControl};

#[test]
fn rabbitmq() {
    let broker = Broker::rabbitmq();
    let url = format!("amqp://{}?connect_timeout=60s", broker.address());
    check(&url);
    send_and_consume(&url);
    let bare = format!("amqp://{}", broker.address());
    quickstart_and_dead_letters(&url, |body| bare_amqp(&bare, body));
    administration(&url, true);
    // It has bindings; what it cannot do it says, with the way that is left.
    let file = std::env::temp_dir().join(format!("polymq-cli-brokers-{}.toml", std::process::id()));
    std::fs::write(&file, "[queues.inbox]\ntopics = [\"admin.events\"]\n").unwrap();
    lines(&url, &["topology", "apply", file.to_str().unwrap()]);
    std::fs::remove_file(file).unwrap();
    lines(&url, &["send", "admin.events", "to the queue", "--topic"]);
    assert_eq!(lines(&url, &["consume", "inbox", "--max", "1", "--timeout", "60s"]), ["to the queue"]);
    refuses(&url, &["channels"], "polymq channels NAME");
    refuses(&url, &["peek", "tools"], "--keep");
}

/// The command ends with code 1 and names the way that is left.
fn refuses(url: &str, arguments: &[&str], way: &str) {
    let output = polymq(url, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && error.contains(way), "{arguments:?}: {error}");
}

/// Rows H8, H9, H10, H12 and H14 from the command line: planned, made once, counted, emptied, deleted; under a prefix too.
fn administration(url: &str, counts: bool) {
    let wanted = ["--queue", "admin", "--group", "admin.events@audit"];
    let topology = |command: &str| lines(url, &[&["topology", command], &wanted[..]].concat());
    let missing = [
        "missing: queue admin",
        "missing: queue admin.dlq",
        "missing: group audit of topic admin.events",
        "missing: queue admin.events.audit.dlq",
    ];
    assert_eq!(topology("plan"), missing);
    assert_eq!(topology("plan"), missing, "a plan changes nothing");
    assert_eq!(topology("apply"), missing.map(|line| line.replace("missing", "made")));
    assert_eq!(topology("apply"), missing.map(|line| line.replace("missing", "present")));
    lines(url, &["send", "admin", "body", "--count", "4", "--existing"]);
    if counts {
        let counted = lines(url, &["channels", "admin", "--json"]);
        let counted: serde_json::Value = serde_json::from_str(&counted[0]).unwrap();
        assert_eq!((&counted["kind"], &counted["stats"]["ready"]), (&"queue".into(), &4.into()));
        assert_eq!(lines(url, &["purge", "admin"]), ["4 messages of queue admin are gone"]);
        assert_eq!(lines(url, &["purge", "admin"]), ["0 messages of queue admin are gone"]);
    }
    lines(url, &["send", "admin", "of dev", "--prefix", "dev"]);
    assert_eq!(lines(url, &["consume", "admin", "--prefix", "dev", "--max", "1", "--timeout", "60s"]), ["of dev"]);
    assert_eq!(lines(url, &["delete", "admin"]), ["deleted queue admin"]);
    assert_eq!(polymq(url, &["delete", "admin"]).status.code(), Some(6), "it was deleted");
    lines(url, &["delete", "admin.events", "--topic", "--group", "audit"]);
}

#[test]
fn mosquitto() {
    let broker = Broker::mosquitto(&[]);
    let url = format!("mqtt://{}?connect_timeout=60s&operation_timeout=60s", broker.address());
    check(&url);
    send_and_consume(&url);
    let port = broker.address().port().to_string();
    quickstart_and_dead_letters(&url, |body| {
        let label = ["-V", "mqttv5", "-D", "PUBLISH", "content-type", "application/json"];
        let sent = Command::new("mosquitto_pub")
            .args(["-p", &port, "-q", "1", "-t", "orders", "-m", body])
            .args(label)
            .status();
        assert!(sent.unwrap().success());
    });
    administration(&url, false);
    refuses(&url, &["channels", "tools"], "counting the messages");
    refuses(&url, &["purge", "tools"], "emptying a queue");
}

/// Everything is logged while real brokers are talked to, and neither the password nor headers nor bodies are in it.
#[test]
fn j8_nothing_secret_is_logged_while_brokers_are_used() {
    const MARKER: &str = "s3cr3t-marker";
    let login = ["--user", "tester", "--password", MARKER];
    let (rabbitmq, mosquitto) = (Broker::rabbitmq_with(&login), Broker::mosquitto(&login));
    let mut logged = 0;
    for url in [
        format!("amqp://tester:{MARKER}@{}?connect_timeout=60s", rabbitmq.address()),
        format!("mqtt://tester:{MARKER}@{}?connect_timeout=60s", mosquitto.address()),
    ] {
        for command in [
            &["send", "vault", MARKER, "--header", "token=s3cr3t-marker", "--content-type", "application/json"][..],
            &["consume", "vault", "--max", "1", "--timeout", "60s"],
            &["check"],
        ] {
            let output = polymq(&url, &[&["--log", "trace"], command].concat());
            let log = String::from_utf8_lossy(&output.stderr);
            assert!(succeeded(&output), "{command:?}: {log}");
            logged += log.lines().count();
            let shown: Vec<_> = log.lines().filter(|line| line.contains(MARKER)).collect();
            assert!(shown.is_empty(), "{command:?}: {shown:#?}");
        }
        let wrong = url.replace(MARKER, "another-s3cr3t-marker");
        let output = polymq(&wrong, &["--log", "trace", "check"]);
        let told = [output.stdout, output.stderr].concat();
        assert_eq!(output.status.code(), Some(5), "not allowed");
        assert!(!String::from_utf8_lossy(&told).contains(MARKER), "a refused login shows the password");
    }
    assert!(logged > 10, "only {logged} lines were logged");
}

/// What the stack may add to its usual ports without meeting anybody, while the claims are held. The ports lie below those
/// that the system gives; `polymq_testkit::free_port` claims even ones in the same way, so the offset is even.
fn free_offset() -> (u16, Vec<UdpSocket>) {
    let claim = |port: u16| {
        let claim = UdpSocket::bind(("127.0.0.1", port)).ok()?;
        TcpListener::bind(("127.0.0.1", port)).is_ok().then_some(claim)
    };
    let claims = |offset: u16| -> Option<Vec<UdpSocket>> {
        [1883, 4566, 5672, 9092, 15672, 25672].into_iter().map(|port| claim(port + offset)).collect()
    };
    (1_000..7_000).step_by(38).find_map(|offset| Some((offset, claims(offset)?))).expect("free ports")
}

/// One command starts the development stack and prints how to use it; another one stops it.
#[test]
fn j24_the_development_stack_is_one_command() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let state = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("stack-{}", std::process::id()));
    let native = Path::new("/usr/lib/rabbitmq/bin/rabbitmq-server").exists();
    let (offset, _claims) = free_offset();
    let offset = offset.to_string();
    let brokers = |arguments: &[&str]| {
        let mut command = Command::new(root.join("scripts/brokers"));
        if native {
            // Beside the stack of whoever runs this test; with Docker it is that stack.
            command.env("POLYMQ_DOCKER", "never").env("POLYMQ_STACK_DIR", &state).env("POLYMQ_STACK_OFFSET", &offset);
        }
        let output = command.args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let _stop = StopsAtTheEnd(|| {
        // Whatever became of the test: what it started must not stay.
        let mut command = Command::new(root.join("scripts/brokers"));
        if native {
            command.env("POLYMQ_DOCKER", "never").env("POLYMQ_STACK_DIR", &state).env("POLYMQ_STACK_OFFSET", &offset);
        }
        let _ = command.arg("stop").output();
        let _ = std::fs::remove_dir_all(&state);
    });
    let printed = brokers(&["start"]);
    let urls: Vec<_> = printed.split_whitespace().filter_map(|word| word.strip_prefix("POLYMQ_URL=")).collect();
    assert_eq!(urls.len(), 4, "RabbitMQ, Mosquitto, Kafka and an emulator of SQS and SNS: {printed}");
    for url in &urls {
        // Just started, all of them.
        check(&format!("{url}?connect_timeout=60s"));
    }
    let urls = urls.len();
    assert_eq!(brokers(&["status"]).matches("running").count(), urls);
    brokers(&["stop"]);
    assert_eq!(brokers(&["status"]).matches("stopped").count(), urls);
}

struct StopsAtTheEnd<F: Fn()>(F);

impl<F: Fn()> Drop for StopsAtTheEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn polymq(url: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polymq")).args(arguments).env("POLYMQ_URL", url).output().unwrap()
}

/// Whether a command has done what it should. A broker that stands still for longer than closing waits is told of, and all else is
/// done by then.
fn succeeded(output: &Output) -> bool {
    let told = String::from_utf8_lossy(&output.stderr);
    let is_late = |line: &str| line.contains("in time") || line.contains("within");
    let gave_up = told.lines().any(|line| line.starts_with("error: ") && line.contains("close") && is_late(line));
    output.status.success() || output.status.code() == Some(1) && gave_up
}

/// The lines of stdout of a command that must succeed.
fn lines(url: &str, arguments: &[&str]) -> Vec<String> {
    let output = polymq(url, arguments);
    assert!(succeeded(&output), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn check(url: &str) {
    let lines = lines(url, &["check", "--timeout", "60s"]);
    assert_eq!(lines.iter().filter(|line| line.starts_with("ok ")).count(), 7, "{lines:#?}");
}

fn send_and_consume(url: &str) {
    let sent = lines(url, &["send", "tools", "hello", "--header", "tenant=acme", "--key", "k", "--count", "2"]);
    assert_eq!(sent.len(), 2);
    let consume = ["consume", "tools", "--max", "2", "--timeout", "60s", "--json"];
    let kept = lines(url, &[&consume[..], &["--keep"]].concat());
    let taken = lines(url, &consume);
    assert_eq!(kept.len(), 2, "{kept:#?}");
    assert_eq!(taken.len(), 2, "what was kept came again: {taken:#?}");
    let message: serde_json::Value = serde_json::from_str(&taken[0]).unwrap();
    assert_eq!(
        (&message["body"], &message["headers"]["tenant"], &message["key"]),
        (&"hello".into(), &"acme".into(), &"k".into())
    );
    let empty = polymq(url, &["consume", "tools", "--timeout", "500ms"]);
    assert_eq!(empty.status.code(), Some(6), "what was printed was acknowledged");
}

/// The quickstart handles its own orders and that of a bare client; what it cannot decode is listed and sent back.
fn quickstart_and_dead_letters(url: &str, bare: impl Fn(&str)) {
    let service = Service::start(url);
    service.expect(["billed order 1 for 9.50", "billed order 2 for 20.00", "billed order 3 for 0.99"]);
    bare(r#"{"id":77,"total":5}"#);
    service.expect(["billed order 77 for 5.00"]);
    for _ in 0..3 {
        bare("{\"id\":");
    }
    bare(r#"{"id":78,"total":5}"#);
    service.expect(["billed order 78 for 5.00"]);
    service.stop();

    // Where the broker counts, what waits is waited for.
    let patience: &[&str] = if url.starts_with("mqtt") { &["--timeout", "60s"] } else { &[] };
    let on = |line: &[&str]| lines(url, &[&["dead-letters"], line, patience].concat());
    let letters = lines(url, &["dead-letters", "list", "orders", "--max", "3", "--timeout", "60s"]);
    assert!(letters.len() == 3 && letters.iter().all(|letter| letter.contains("undecodable")), "{letters:#?}");
    let two = on(&["replay", "orders", "--max", "2"]);
    assert_eq!(two, ["2 sent back to queue orders"]);
    let replayed = on(&["replay", "orders", "--max", "1"]);
    assert_eq!(replayed, ["1 sent back to queue orders"]);
    let back = lines(url, &["consume", "orders", "--max", "3", "--timeout", "60s"]);
    assert_eq!(back, ["{\"id\":"; 3]);
}

/// The example, as a process of its own.
struct Service {
    process: Child,
    printed: mpsc::Receiver<String>,
}

impl Service {
    fn start(url: &str) -> Self {
        let mut process = Command::new(quickstart()).env("POLYMQ_URL", url).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = process.stdout.take().unwrap();
        let (sender, printed) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { process, printed }
    }

    /// Waits for these lines, in any order, and no others.
    fn expect<const N: usize>(&self, expected: [&str; N]) {
        let mut lines: Vec<String> = Vec::new();
        while lines.len() < N {
            match self.printed.recv_timeout(Duration::from_secs(30)) {
                Ok(line) => lines.push(line),
                Err(_) => break,
            }
        }
        lines.sort();
        let mut expected = expected.map(str::to_owned).to_vec();
        expected.sort();
        assert_eq!(lines, expected);
    }

    /// Ctrl-C.
    fn stop(mut self) {
        let interrupted = Command::new("kill").args(["-INT", &self.process.id().to_string()]).status().unwrap();
        assert!(interrupted.success());
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // After a failed assertion; it has ended otherwise.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The example, built once, here or by `scripts/test`.
fn quickstart() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(built) = std::env::var_os("POLYMQ_QUICKSTART").filter(|built| !built.is_empty()) {
            return built.into();
        }
        let target = Path::new(env!("CARGO_BIN_EXE_polymq")).ancestors().nth(2).unwrap();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--package", "quickstart", "--target-dir"])
            .arg(target)
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .status();
        assert!(built.unwrap().success());
        target.join("debug/quickstart")
    })
}

/// A client that knows nothing of polymq.
fn bare_amqp(url: &str, body: &str) {
    use lapin::{BasicProperties, Connection, ConnectionProperties, options::BasicPublishOptions};
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let properties = BasicProperties::default().with_content_type("application/json".into());
        let options = BasicPublishOptions::default();
        let sent =
            channel.basic_publish("".into(), "orders".into(), options, body.as_bytes(), properties).await.unwrap();
        sent.await.unwrap();
        connection.close(200, "done".into()).await.unwrap();
    });
}
