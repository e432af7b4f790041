//! What is measured on the brokers, and what is asked of polymq's: to be ahead of both at the same durability.

use harness::plan::{Broker, Plan, Row, Table};

/// Only the last table is measured, with so many messages that wait instead of 50 000: one million takes minutes.
const STORED: &str = "POLYMQ_BENCH_STORED";

pub fn brokers() -> Vec<Broker> {
    vec![
        Broker::new(Broker::POLYMQ, &[], "http://127.0.0.1:{port}"),
        Broker::new("rabbitmq", &[], "amqp://127.0.0.1:{port}"),
        Broker::new("nats", &[], "nats://127.0.0.1:{port}"),
    ]
}

/// The four that are compared, with one kind of work. The slower of a broker's ways does not count against it.
fn rows(work: &str, messages: u64, options: &[String]) -> Vec<Row> {
    let row = |broker: &str, label: &str| {
        let mut row = Row::new(&format!("{broker}-{work}"), messages, label).on(broker);
        row.options = options.to_vec();
        row
    };
    vec![
        row("polymq", "polymq broker"),
        row("rabbitmq", "RabbitMQ, quorum queue").keyed("rabbitmq-quorum").with("kind=quorum"),
        row("rabbitmq", "RabbitMQ, durable classic queue").keyed("rabbitmq-classic").with("kind=classic"),
        // A sync for each message: fewer of them tell the same, in the same time. Where they are consumed, all would be fetched
        // before the clock starts if they were so few.
        Row {
            messages: if work == "consume" { messages } else { messages.min(1_600) },
            ..row("nats", "NATS JetStream, file, sync always").keyed("nats")
        },
    ]
}

/// polymq must be ahead of every other row.
fn ahead(mut rows: Vec<Row>, metric: &str, less: bool) -> Vec<Row> {
    let others: Vec<String> = rows[1..].iter().map(|row| row.key.clone()).collect();
    let sign = if less { "<=" } else { ">=" };
    let mut first = rows.remove(0).keyed("polymq");
    for other in others {
        first = first.against(metric, sign, &other, 1.0);
    }
    rows.insert(0, first);
    rows
}

pub fn plan(_: bool) -> Plan {
    let asked: Option<u64> = std::env::var(STORED).ok().and_then(|text| text.parse().ok());
    let tables = match asked {
        Some(waiting) => vec![stored(waiting)],
        None => traffic().into_iter().chain([start(), stored(50_000)]).collect(),
    };
    Plan { brokers: brokers(), tables }
}

fn traffic() -> Vec<Table> {
    let mut tables = Vec::new();
    for (size, id, bytes, messages) in [("256 bytes", "small", 256, 12_800), ("4 KiB", "large", 4096, 6_400)] {
        for clients in [1, 16] {
            let options = [format!("size={bytes}"), format!("workers={clients}")];
            let of = if clients == 1 { "one client".to_owned() } else { format!("{clients} clients") };
            let mut publish = ahead(rows("publish", messages, &options), "per_second", false);
            let mut single = rows("publish", messages, &options).remove(0).keyed("polymq-single");
            single.label = "polymq broker, a message a request".into();
            publish[0].label = "polymq broker, 32 messages a request".into();
            publish[0].options.push("batch=32".into());
            publish.insert(1, single);
            tables.push(
                Table::new(format!("broker-publish-{id}-{clients}"), format!("Brokers, publish, {size}, {of}"))
                    .note("Until the last confirm; 128 unconfirmed a client, a connection each.")
                    .compared_with("rabbitmq-quorum")
                    .rows(publish),
            );
            tables.push(
                Table::new(format!("broker-consume-{id}-{clients}"), format!("Brokers, consume, {size}, {of}"))
                    .note(
                        "From the first to the last message handled, acknowledged after that; 128 fetched ahead a client, a \
                         connection each. The queue is checked to be empty at the end.",
                    )
                    .compared_with("rabbitmq-quorum")
                    .rows(ahead(rows("consume", messages, &options), "per_second", false)),
            );
            tables.push(
                Table::new(
                    format!("broker-latency-{id}-{clients}"),
                    format!("Brokers, from sender to receiver, {size}, {of} on each side"),
                )
                .note("A message a millisecond in all, acknowledged; one process sends and receives.")
                .less_of("p50_us")
                .compared_with("rabbitmq-quorum")
                .rows(ahead(rows("latency", 1_000, &options), "p99_us", true)),
            );
        }
    }
    tables
}

/// A server that the scenario starts itself.
fn on(scenario: &str, kind: &str, label: &str, messages: u64) -> Row {
    Row::new(scenario, messages, label).keyed(kind).with(format!("broker={kind}"))
}

fn start() -> Table {
    Table::new("broker-start", "Brokers, from the start of the process to its first answer")
        .note("With an empty folder; to ten milliseconds.")
        .less_of("start_ms")
        .compared_with("rabbitmq")
        .rows(ahead(
            vec![
                on("start", "polymq", "polymq broker", 1),
                on("start", "rabbitmq", "RabbitMQ", 1),
                on("start", "nats", "NATS", 1),
            ],
            "start_ms",
            true,
        ))
}

fn stored(waiting: u64) -> Table {
    let quorum = Row { broker: String::new(), ..on("stored", "rabbitmq", "RabbitMQ, quorum queue", waiting) };
    let classic = on("stored", "rabbitmq", "RabbitMQ, durable classic queue", waiting);
    Table::new(format!("broker-stored-{waiting}"), format!("Brokers, {waiting} messages of 256 bytes wait"))
        .note("Resident memory of the server and disk that its folder takes, straight after the last confirm.")
        .less_of("memory_mb")
        .rounds(1, 1)
        .rows(ahead(
            vec![
                on("stored", "polymq", "polymq broker", waiting),
                quorum.keyed("rabbitmq-quorum").with("kind=quorum"),
                classic.keyed("rabbitmq-classic").with("kind=classic"),
                on("stored", "nats", "NATS JetStream, file, sync always", waiting),
            ],
            "disk_mb",
            true,
        ))
}
