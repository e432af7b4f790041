//! The command as scripts and people see it: output, one sentence for each mistake, exit codes. Without any broker.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

const MARKER: &str = "s3cr3t-marker";

/// The command without the variables that choose a broker.
fn polymq() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polymq"));
    for (name, _) in std::env::vars() {
        if name.starts_with("POLYMQ_") || name.starts_with("RMQ_") {
            command.env_remove(name);
        }
    }
    command
}

fn run(line: &str) -> Output {
    polymq().args(line.split_whitespace()).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// Exit code and one sentence on stderr with these parts, nothing else.
fn fails(output: &Output, code: i32, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    let sentences: Vec<_> = text.lines().filter(|line| !line.starts_with("note: ")).collect();
    assert_eq!(sentences.len(), 1, "{text}");
    assert!(text.contains("error: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing: {text}");
    }
    for noise in ["panicked", "backtrace", "Error {"] {
        assert!(!text.contains(noise), "{text}");
    }
}

#[test]
fn backends_prints_the_table() {
    let output = run("backends");
    assert!(output.status.success());
    let text = stdout(&output);
    for word in ["memory", "delayed retry"] {
        assert!(text.contains(word), "{word} is missing: {text}");
    }
    assert_eq!(text.contains("kubemq: not in this program"), !cfg!(feature = "kubemq"), "{text}");
    let output = run("backends --json");
    let lines: Vec<serde_json::Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let memory = lines.iter().find(|line| line["name"] == "memory").unwrap();
    assert_eq!(memory["capabilities"]["confirms"], true);
    assert_eq!(memory["settings"][0]["name"], "url");
    assert!(lines.iter().any(|line| line["name"] == "kubemq" && line["linked"] == cfg!(feature = "kubemq")));
}

#[test]
fn backends_prints_the_settings_of_one() {
    let output = run("backends memory");
    assert!(stdout(&output).contains("capacity_bytes"), "{}", stdout(&output));
    fails(&run("backends memroy"), 3, &["unknown backend \"memroy\"", "did you mean \"memory\"?"]);
}

#[test]
fn send_tells_the_ids() {
    let output = polymq().args(["send", "orders", r#"{"id":1}"#, "--count", "3"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).lines().filter(|line| line.starts_with("sent ")).count(), 3);
    assert!(stderr(&output).contains("note: the memory backend ends with this command"));

    let output = polymq().args(["send", "orders", "x", "--id", "my-id", "--json"]).output().unwrap();
    let line: serde_json::Value = serde_json::from_str(stdout(&output).trim()).unwrap();
    assert_eq!(line["sent"], "my-id");
    assert_eq!(stderr(&output), "", "notes are for people");
}

#[test]
fn send_reads_stdin() {
    let mut child = polymq()
        .args(["send", "events", "-", "--topic", "--header", "a=b=c", "--kind", "order.created", "--kind-version", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"\xff\x00").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(stdout(&output).contains("to topic events"));
}

#[test]
fn consume_ends_when_nothing_comes() {
    fails(&run("consume orders --timeout 50ms"), 6, &["no message came within 50ms"]);
    fails(&run("consume orders --timeout 50ms --existing"), 6, &["\"orders\"", "does not exist"]);
    let refused = run("dead-letters replay events --topic --group audit");
    assert!(refused.status.code() == Some(2) && stderr(&refused).contains("--topic"), "{}", stderr(&refused));
    for command in ["list", "replay"] {
        // A wrong name is told, and nothing is made for it.
        fails(&run(&format!("dead-letters {command} ordres")), 6, &["\"ordres.dlq\"", "does not exist"]);
    }
}

/// Each line of a file, or the whole of it.
#[test]
fn send_reads_files() {
    let path = std::env::temp_dir().join(format!("polymq-cli-lines-{}", std::process::id()));
    std::fs::write(&path, "one\r\ntwo\n\nthree").unwrap();
    let sent = |option: &str| polymq().args(["send", "orders", option]).arg(&path).output().unwrap();
    let count = |output: &Output| stdout(output).lines().filter(|line| line.starts_with("sent ")).count();
    assert_eq!((count(&sent("--lines")), count(&sent("--file"))), (3, 1));
    std::fs::remove_file(&path).unwrap();
    fails(&sent("--lines"), 2, &["polymq-cli-lines", "cannot be read"]);
    fails(&run("send orders body --file /nowhere"), 2, &["--file"]);
}

/// Messages that were sent are told even when nobody reads that, and those that were not even more so.
#[test]
fn send_tells_failures_to_a_reader_that_goes_away() {
    let path = std::env::temp_dir().join(format!("polymq-cli-refused-{}", std::process::id()));
    std::fs::write(&path, "short\n\nmuch too long\n").unwrap();
    let mut child = polymq()
        .args(["send", "orders", "--set", "max_payload=10", "--lines"])
        .arg(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    std::fs::remove_file(&path).unwrap();
    fails(&output, 1, &["1 of 2 messages were not sent (line 3)"]);
}

#[test]
fn a_duration_that_no_clock_can_add_is_for_ever() {
    for option in ["--expires", "--delay"] {
        let output = run(&format!("send orders x {option} 10000000000000000000s"));
        assert!(output.status.success(), "{option}: {}", stderr(&output));
    }
}

/// More than are fetched at once are shown, and looking at dead letters makes no queue.
#[cfg(feature = "embedded")]
#[test]
fn j18_consume_keeps_as_many_as_it_shows() {
    let folder = std::env::temp_dir().join(format!("polymq-cli-keep-{}", std::process::id()));
    let url = format!("embedded://{}", folder.display());
    let on = |line: &str| {
        let output = polymq().args(line.split_whitespace()).args(["--url", &url]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", stderr(&output));
        (stdout(&output).lines().count(), stderr(&output).to_owned())
    };
    on("send orders body --count 110");
    for _ in 0..2 {
        assert_eq!(on("consume orders --max 100 --keep --timeout 60s").0, 100);
    }
    assert_eq!(on("consume orders --max 110 --timeout 60s").0, 110, "all are back");
    fails(&run(&format!("consume orders --timeout 50ms --url {url}")), 6, &["no message came within 50ms"]);
    // The broker counts: nothing is waited for.
    assert!(on("dead-letters list orders").1.contains("has no dead letters"));
    let channels = run(&format!("channels --url {url}"));
    assert!(!stdout(&channels).contains("dlq.dlq"), "{}", stdout(&channels));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Looking takes nothing, however often.
#[cfg(feature = "embedded")]
#[test]
fn j18_peek_shows_what_waits_and_takes_nothing() {
    let folder = std::env::temp_dir().join(format!("polymq-cli-peek-{}", std::process::id()));
    let url = format!("embedded://{}", folder.display());
    let on = |line: &str| {
        let output = polymq().args(line.split_whitespace()).args(["--url", &url]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", stderr(&output));
        stdout(&output).to_owned()
    };
    on("send orders first");
    on("send orders second");
    for line in ["peek orders", "peek orders", "consume orders --max 2"] {
        let shown = on(line);
        assert!(shown.contains("first") && shown.contains("second"), "{line}: {shown}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// What has nothing to show on a fresh broker says so, with its exit code; a plan and what is made of it are printed.
#[test]
fn administration_without_a_broker() {
    let output = run("channels");
    assert!(output.status.success() && stderr(&output).contains("there are no channels"), "{}", stderr(&output));
    fails(&run("channels orders"), 6, &["\"orders\"", "does not exist"]);
    fails(&run("peek orders"), 6, &["\"orders\"", "does not exist"]);
    fails(&run("purge orders"), 6, &["\"orders\"", "does not exist"]);
    fails(&run("delete orders"), 6, &["\"orders\"", "does not exist"]);
    fails(&run("topology plan"), 2, &["FILE"]);
    fails(&run("topology plan --group audit"), 2, &["expected TOPIC@GROUP"]);
    fails(&run("topology apply /nowhere.toml"), 3, &["/nowhere.toml"]);
    fails(&run("purge amq\u{7}"), 2, &["control character"]);

    let path = std::env::temp_dir().join(format!("polymq-cli-topology-{}.toml", std::process::id()));
    std::fs::write(&path, "[queues.inbox]\ntopics = [\"events\"]\n[topics.events]\ngroups = [\"audit\"]\n").unwrap();
    let topology = |arguments: &[&str]| polymq().arg("topology").args(arguments).arg(&path).output().unwrap();
    let (plan, apply) = (topology(&["plan", "--queue", "orders"]), topology(&["apply", "--json"]));
    let broken = std::fs::write(&path, "[queue.inbox]\n").map(|()| topology(&["plan"])).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        stdout(&plan).lines().collect::<Vec<_>>(),
        [
            "missing: queue inbox",
            "missing: queue inbox.dlq",
            "missing: queue orders",
            "missing: queue orders.dlq",
            "missing: topic events",
            "missing: group audit of topic events",
            "missing: queue events.audit.dlq",
            "ensured: binding of queue inbox to topic events",
        ]
    );
    assert!(stderr(&plan).contains("7 of 8 missing; nothing was changed"), "{}", stderr(&plan));
    let made: Vec<serde_json::Value> = stdout(&apply).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(made.len(), 6);
    assert_eq!((&made[0]["state"], &made[0]["name"]), (&"made".into(), &"inbox".into()));
    fails(&broken, 3, &["unknown field `queue`"]);
}

/// What was missing is made; what has that word in its name keeps it.
#[test]
fn made_is_a_state_and_no_part_of_a_name() {
    let path = std::env::temp_dir().join(format!("polymq-cli-missing-{}.toml", std::process::id()));
    std::fs::write(&path, "[queues.missing-items]\ntopics = [\"events\"]\n").unwrap();
    let output = polymq().args(["topology", "apply"]).arg(&path).output().unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        stdout(&output).lines().collect::<Vec<_>>(),
        [
            "made: queue missing-items",
            "made: queue missing-items.dlq",
            "ensured: binding of queue missing-items to topic events",
        ]
    );
}

#[test]
fn check_goes_through_every_step() {
    let output = run("check");
    assert!(output.status.success(), "{}", stdout(&output));
    assert_eq!(stdout(&output).lines().filter(|line| line.starts_with("ok ")).count(), 7);
    assert!(stdout(&output).contains("memory works; accepted messages do not survive a restart"));
}

/// Without a broker in between, what is sent would be handled: the server is asked whether it is there, and no more.
#[cfg(feature = "http")]
#[test]
fn check_of_a_server_sends_nothing() {
    use std::io::{BufRead, BufReader};

    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let asked = std::thread::spawn(move || {
        let (stream, _) = server.accept().unwrap();
        let head: Vec<_> =
            BufReader::new(&stream).lines().map_while(|line| line.ok().filter(|line| !line.is_empty())).collect();
        (&stream).write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").unwrap();
        (head, server)
    });
    let output = run(&format!("check --url {url}"));
    assert!(output.status.success(), "{}", stdout(&output));
    assert_eq!(stdout(&output).lines().filter(|line| line.starts_with("ok ")).count(), 3);
    assert!(stdout(&output).contains("http reaches its server"), "{}", stdout(&output));
    let (head, server) = asked.join().unwrap();
    assert!(head[0].starts_with("OPTIONS "), "{head:?}");
    server.set_nonblocking(true).unwrap();
    assert!(server.accept().is_err(), "nothing else is asked for");
}

/// Somebody takes the connection and never says a word: a message may have arrived there, a question is in vain.
#[cfg(feature = "http")]
#[test]
fn a_server_that_never_answers() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}?connect_timeout=500ms", silent.local_addr().unwrap());
    assert_eq!(run(&format!("check --url {url}")).status.code(), Some(4));
    // Nor does it say one of TLS, without which nothing is sent.
    let url = url.replace("http", "https");
    fails(&run(&format!("send orders x --url {url}")), 4, &["no connection was made in time"]);
}

#[test]
fn wrong_usage() {
    fails(&run("send orders"), 2, &["<BODY>"]);
    fails(&run("sned orders x"), 2, &["sned"]);
    fails(&run("send orders x --colour red"), 2, &["--colour"]);
    fails(&run("send orders x --header novalue"), 2, &["expected NAME=VALUE"]);
    fails(&run("send orders x --count 0"), 2, &["--count"]);
    fails(&run("consume orders --timeout 5"), 2, &["duration with its unit"]);
    fails(&run("consume orders --keep"), 2, &["--max"]);
    let no_name = polymq().args(["send", "", "x"]).output().unwrap();
    fails(&no_name, 2, &["the queue name \"\" is empty"]);
    assert_eq!(run("").status.code(), Some(2));
    assert_eq!(run("--help").status.code(), Some(0));
    assert!(stdout(&run("--help")).contains("Exit codes:"));
}

#[test]
fn wrong_configuration() {
    fails(&run("send orders x --backend kakfa"), 3, &["unknown backend \"kakfa\"", "did you mean \"kafka\"?"]);
    if !cfg!(feature = "kubemq") {
        fails(&run("send orders x --backend kubemq"), 3, &["not compiled in", "add the feature \"kubemq\""]);
    }
    fails(&run("send orders x --url nonsense"), 3, &["no URL", "scheme://"]);
    fails(&run("send orders x --url memory://a/b"), 3, &["memory"]);
    fails(&run("send orders x --backend memory --url mqtt://host"), 3, &["scheme \"mqtt\""]);
    fails(&run("send orders x --set capacitty=1"), 3, &["unknown setting \"capacitty\"", "did you mean \"capacity\"?"]);
    fails(&run("send orders x --set capacity=many"), 3, &["\"many\" is not valid"]);
    let variable = polymq().args(["send", "orders", "x"]).env("POLYMQ_MEMORY_CAPACITY", "many").output().unwrap();
    fails(&variable, 3, &["POLYMQ_MEMORY_CAPACITY"]);
}

#[cfg(all(feature = "amqp", feature = "mqtt"))]
#[test]
fn brokers_that_are_not_there() {
    for (url, setting) in [("amqp://127.0.0.1:1", "heartbeat=soon"), ("mqtt://127.0.0.1:1", "keep_alive=soon")] {
        fails(&run(&format!("send orders x --url {url}")), 4, &["127.0.0.1:1"]);
        fails(&run(&format!("send orders x --url {url} --set {setting}")), 3, &["\"soon\" is not valid", "such as"]);
        let output = run(&format!("check --url {url}"));
        assert_eq!(output.status.code(), Some(4));
        let text = stdout(&output);
        for part in ["ok      configuration", "FAILED  connect", "next: ", "send: not tried"] {
            assert!(text.contains(part), "{part:?} is missing: {text}");
        }
    }
    // Somebody takes the connection and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for scheme in ["amqp", "mqtt"] {
        let url = format!("{scheme}://{}?connect_timeout=500ms", silent.local_addr().unwrap());
        fails(&run(&format!("send orders x --url {url}")), 4, &["error: "]);
        assert_eq!(run(&format!("check --url {url}")).status.code(), Some(4), "{scheme}");
        assert_eq!(run(&format!("check --timeout 100ms --url {url}")).status.code(), Some(4), "{scheme}");
    }
    // The URL of the environment goes with --backend, when it leads to that backend.
    let output =
        polymq().args(["send", "q", "x", "--backend", "mqtt"]).env("POLYMQ_URL", "mqtt://127.0.0.1:1").output();
    fails(&output.unwrap(), 4, &["127.0.0.1:1"]);
}

#[test]
fn errors_are_objects_for_machines() {
    let output = run("--json send orders x --backend kakfa");
    let error: serde_json::Value = serde_json::from_str(stderr(&output).trim()).unwrap();
    assert_eq!(error["exit"], 3);
    assert!(error["error"].as_str().unwrap().contains("kakfa"));
    let output = run("--json send");
    let error: serde_json::Value = serde_json::from_str(stderr(&output).trim()).unwrap();
    assert_eq!((output.status.code(), &error["exit"]), (Some(2), &2.into()));
    assert!(error["error"].as_str().unwrap().ends_with("see polymq --help"), "{error}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for line in ["backends", "--help", "send orders x --count 5", "check"] {
        let mut child =
            polymq().args(line.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{line}: {}", stderr(&output));
        assert!(!stderr(&output).contains("error"), "{line}: {}", stderr(&output));
    }
}

/// Everything is logged, and neither passwords nor headers nor bodies are in it.
#[test]
fn secrets_and_bodies_are_not_logged() {
    let urls: &[&str] = if cfg!(all(feature = "amqp", feature = "mqtt")) {
        &["memory://", "amqp://user:s3cr3t-marker@127.0.0.1:1", "mqtt://user:s3cr3t-marker@127.0.0.1:1"]
    } else {
        &["memory://"]
    };
    for url in urls {
        for command in [
            &["check"][..],
            &["consume", "orders", "--timeout", "50ms"],
            &["send", "orders", MARKER, "--header", "token=s3cr3t-marker"],
        ] {
            let output = polymq().args(["--log", "trace"]).args(command).env("POLYMQ_URL", url).output().unwrap();
            assert!(!stdout(&output).contains(MARKER), "{url} {command:?}: {}", stdout(&output));
            assert!(!stderr(&output).contains(MARKER), "{url} {command:?}: {}", stderr(&output));
        }
    }
    for broken in ["amqp://user:s3cr3t-marker@[", "user:s3cr3t-marker@host", "memory://user:s3cr3t-marker@host"] {
        let output = polymq().args(["check"]).env("POLYMQ_URL", broken).output().unwrap();
        assert_eq!(output.status.code(), Some(3));
        assert!(!stdout(&output).contains(MARKER) && !stderr(&output).contains(MARKER), "{}", stdout(&output));
    }
}

/// A proxy for one connection: the lines of the first request, which it answers with this.
#[cfg(feature = "http")]
fn proxy(answer: &'static str) -> (String, std::thread::JoinHandle<Vec<String>>) {
    use std::io::{BufRead, BufReader};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://agent:{MARKER}@{}", listener.local_addr().unwrap());
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
        let lines = lines.take_while(|line| !line.is_empty()).collect();
        stream.write_all(answer.as_bytes()).unwrap();
        lines
    });
    (url, serving)
}

#[test]
#[cfg(feature = "http")]
fn http_goes_by_way_of_the_proxy_that_the_environment_names() {
    let send = |variable: &str, proxy: &str, target: &str| {
        let mut command = polymq();
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        command.env(variable, proxy).args(["send", "--url", target, "orders", "x"]).output().unwrap()
    };
    // "agent" and the marker.
    let shown = "proxy-authorization: Basic YWdlbnQ6czNjcjN0LW1hcmtlcg==";

    let (url, serving) = proxy("HTTP/1.1 204 No Content\r\n\r\n");
    let output = send("http_proxy", &url, "http://shop.example/in");
    assert!(output.status.success(), "{}", stderr(&output));
    let lines = serving.join().unwrap();
    assert_eq!(lines[0], "POST http://shop.example/in/orders HTTP/1.1");
    assert!(lines.iter().any(|line| line == shown), "{lines:?}");
    assert!(lines.iter().any(|line| line == "host: shop.example"), "{lines:?}");

    let (url, serving) = proxy("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
    let output = send("https_proxy", &url, "https://shop.example/in");
    assert!(!output.status.success() && stderr(&output).contains("the proxy answered 403"), "{}", stderr(&output));
    assert!(!stderr(&output).contains(MARKER), "{}", stderr(&output));
    let lines = serving.join().unwrap();
    assert_eq!(lines[0], "CONNECT shop.example:443 HTTP/1.1");
    assert!(lines.iter().any(|line| line.eq_ignore_ascii_case(shown)), "{lines:?}");

    // What is on this machine is not asked of a proxy, and one that cannot be spoken to is named.
    let output = send("all_proxy", "https://127.0.0.1:9", "http://127.0.0.1:1");
    assert!(stderr(&output).contains("refused") && !stderr(&output).contains("proxy"), "{}", stderr(&output));
    let output = send("all_proxy", "https://127.0.0.1:9", "http://shop.example");
    assert!(stderr(&output).contains("a proxy with https://, expected http://"), "{}", stderr(&output));
}
