//! Rules that every backend shares: headers, names, ids, backoff, queue tables.

use std::{collections::HashSet, time::Duration};

use polymq_core::{Address, Backoff, ErrorKind, Headers, Jitter, Message, MessageId, QueueTable, Registry};

fn check(name: &str, value: &str) -> Result<(), String> {
    let headers: Headers = [(name.to_owned(), value.to_owned())].into_iter().collect();
    headers.check().map_err(|error| {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.to_string()
    })
}

#[test]
fn headers_that_some_broker_cannot_carry_are_refused_alike() {
    for name in ["tenant", "X-Trace.Id_1", "a"] {
        assert_eq!(check(name, "any text: ünïcödé, \"quotes\", a/b, ../.."), Ok(()));
    }
    for name in ["", "with space", "ünïcödé", "a:b", "a\nb", "polymq-attempt", "ce-id", "CE-id", "cloudEvents:id"] {
        assert!(check(name, "x").is_err(), "{name:?}");
    }
    for value in ["line\nbreak", "null\0", "\u{7f}", "\u{85}"] {
        assert!(check("name", value).is_err(), "{value:?}");
    }
    assert!(check("name", &"x".repeat(4096)).is_ok());
    assert!(check("name", &"x".repeat(4097)).expect_err("too long").contains("4097 bytes, at most 4096"));
    let colliding: Headers = [("Tenant", "a"), ("tenant", "b")].into_iter().collect();
    assert!(colliding.check().is_err());
    let many: Headers = (0..65).map(|n| (format!("h{n}"), "x")).collect();
    assert!(many.check().is_err());
}

/// As many as one message of some brokers may carry; looking through all of them for each would take minutes.
#[test]
fn headers_without_number_are_read_and_named_once() {
    const MANY: usize = 200_000;
    let mut message = Message::new("x");
    for round in 0..2 {
        for n in 0..MANY {
            message.add_wire_header(format!("h{n}"), format!("{n} {round}"));
        }
    }
    let headers = message.headers();
    assert_eq!(headers.len(), MANY);
    let last = format!("h{}", MANY - 1);
    assert_eq!((headers.get("h0"), headers.get(&last)), (Some("0 1"), Some(&*format!("{} 1", MANY - 1))));
    let mut fewer = headers.clone();
    assert_eq!(fewer.remove("h1").as_deref(), Some("1 1"));
    assert_ne!(*headers, fewer);
    fewer.insert("h2", "changed");
    fewer.insert("h1", "back");
    assert_eq!((fewer.len(), fewer.get("h2"), fewer.get("h1")), (MANY, Some("changed"), Some("back")));
    assert_eq!(fewer.iter().last(), Some(("h1", "back")));
}

#[test]
fn names_of_channels() {
    for name in ["orders", "a.b", "a/b", "ünïcödé", "with space inside"] {
        assert!(Address::queue(name).check().is_ok(), "{name:?}");
    }
    for name in ["", " orders", "orders\n", &"x".repeat(201)] {
        assert_eq!(Address::topic(name).check().expect_err("refused").kind(), ErrorKind::InvalidInput, "{name:?}");
    }
    assert_eq!(Address::topic("t").dead_letters(Some("g")), Address::queue("t.g.dlq"));
    assert_eq!(Address::topic("a/+/#").dead_letters(None), Address::queue("a/_/_.dlq"));
    assert_eq!(Address::queue("a+b").dead_letters(None), Address::queue("a+b.dlq"));
}

const CHILD: &str = "POLYMQ_TEST_IDS_CHILD";

/// Not a test of its own: what each process of the next one runs.
#[test]
fn b6_child_prints_ids() {
    if std::env::var_os(CHILD).is_some() {
        let ids: Vec<String> = (0..250_000).map(|_| format!("id {}", MessageId::new())).collect();
        println!("\n{}", ids.join("\n"));
    }
}

#[test]
fn b6_a_million_ids_of_four_processes_are_unique() {
    let program = std::env::current_exe().expect("this test");
    let children: Vec<_> = (0..4)
        .map(|_| {
            let mut command = std::process::Command::new(&program);
            command.args(["--exact", "rules::b6_child_prints_ids", "--nocapture"]).env(CHILD, "1");
            command.stdout(std::process::Stdio::piped()).spawn().expect("starts")
        })
        .collect();
    let mut ids = HashSet::new();
    for child in children {
        let output = child.wait_with_output().expect("ends");
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).expect("text");
        ids.extend(text.lines().filter_map(|line| line.strip_prefix("id ")).map(str::to_owned));
    }
    assert_eq!(ids.len(), 1_000_000);
    assert_eq!(MessageId::new().as_uuid().map(|uuid| uuid.get_version_num()), Some(7));
}

#[test]
fn ids_come_back_as_they_were_written() {
    for text in ["0199a0f2-5c3e-7000-8000-000000000001", "0199A0F2-5C3E-7000-8000-000000000001", "order-7", "ä"] {
        assert_eq!(MessageId::parse(text).to_string(), text);
    }
    assert_eq!(Message::new("x").with_id("order-7").id().map(ToString::to_string).as_deref(), Some("order-7"));
}

#[test]
fn j8_debug_output_holds_no_body_and_no_header_value() {
    let message = Message::new("s3cr3t-body").with_header("token", "s3cr3t-value").with_key("k");
    let text = format!("{message:?}");
    assert!(!text.contains("s3cr3t"), "{text}");
    assert!(text.contains("token"), "{text}");
}

#[test]
fn f22_backoff_grows_to_its_bound_and_jitter_stays_inside() {
    let backoff =
        Backoff { initial: Duration::from_millis(100), factor: 2.0, max: Duration::from_secs(1), jitter: Jitter::None };
    let delays: Vec<_> = (1..=6).map(|attempt| backoff.delay(attempt).as_millis()).collect();
    assert_eq!(delays, [100, 200, 400, 800, 1000, 1000]);
    assert_eq!(backoff.delay(u32::MAX), Duration::from_secs(1));
    for (jitter, low) in [(Jitter::Equal, 200), (Jitter::Full, 0)] {
        let jittered = Backoff { jitter, ..backoff };
        let samples: Vec<_> = (0..1000).map(|_| jittered.delay(3)).collect();
        let (low, high) = (Duration::from_millis(low), Duration::from_millis(400));
        assert!(samples.iter().all(|delay| (low..=high).contains(delay)), "{jitter:?}");
        let distinct: HashSet<_> = samples.iter().collect();
        assert!(distinct.len() > 900, "{jitter:?} is random");
    }
}

#[test]
fn d6_the_queue_table_reads_both_shapes_and_round_trips() {
    let registry = Registry::linked();
    let toml = "[queues.orders]\nconsumer = \"memory\"\nproducer = \"memory\"\n[backends.memory]\ncapacity = 10\n";
    let table = QueueTable::from_toml(toml).expect("valid");
    table.check(&registry).expect("known backends");
    let written = toml::to_string(&table).expect("can be written");
    assert_eq!(QueueTable::from_toml(&written).expect("valid"), table);

    let seed = r#"{"queue_1": {"name": "queue_1", "consumer_loop": "memory", "producer": "memory"}}"#;
    let table = QueueTable::from_json(seed).expect("valid");
    assert_eq!(table.queues["queue_1"].consumer, "memory");

    let wrong = QueueTable::from_toml("[queues.orders]\nconsumer = \"kafak\"\nproducer = \"memory\"").expect("a table");
    let text = wrong.check(&registry).expect_err("unknown backend").to_string();
    assert!(text.contains("\"orders\"") && text.contains("unknown backend \"kafak\""), "{text}");
    let text = QueueTable::from_toml("[queues.orders]\nconsumr = \"memory\"").expect_err("unknown key").to_string();
    assert!(text.contains("consumr"), "{text}");

    let secret = "amqp://me:s3cr3t-marker@host";
    let toml = QueueTable::from_toml(&format!("queues = {{}}\n[backends]\namqp = \"{secret}\""));
    let json = QueueTable::from_json(&format!(r#"{{"queues": {{}}, "backends": {{"amqp": "{secret}"}}}}"#));
    for error in [toml.expect_err("no section"), json.expect_err("no section")] {
        let text = format!("{error} {error:?}");
        assert!(text.contains("expected a map") && !text.contains("s3cr3t"), "{text}");
    }
}
