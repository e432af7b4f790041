//! What is measured, against what, and what design asks of it.

/// Metric, sign, limit.
pub type Limit = (&'static str, &'static str, f64);

#[derive(Clone, Default)]
pub struct Row {
    pub key: &'static str,
    pub label: &'static str,
    pub program: &'static str,
    pub scenario: &'static str,
    pub options: Vec<String>,
    pub n: u64,
    pub baseline: &'static str,
    pub bars: Vec<Limit>,
    /// Metric, sign, key of another row, factor.
    pub against: Vec<(&'static str, &'static str, &'static str, f64)>,
}

pub struct Table {
    pub id: &'static str,
    pub title: &'static str,
    pub note: &'static str,
    pub metric: &'static str,
    pub less_is_better: bool,
    /// Whether allocations and instructions are counted too.
    pub counts: bool,
    pub rounds: usize,
    pub quick_rounds: usize,
    pub rows: Vec<Row>,
}

pub fn tables(part: &str, quick: bool) -> Vec<Table> {
    match part {
        "memory" => memory(),
        "amqp" => amqp(quick),
        _ => mqtt(quick),
    }
}

fn row(program: &'static str, baseline: &'static str, n: u64, scenario: &'static str, label: &'static str) -> Row {
    Row { key: scenario, label, program, scenario, n, baseline, ..Row::default() }
}

impl Row {
    fn bar(mut self, metric: &'static str, sign: &'static str, limit: f64) -> Self {
        self.bars.push((metric, sign, limit));
        self
    }

    fn against(mut self, metric: &'static str, sign: &'static str, other: &'static str, factor: f64) -> Self {
        self.against.push((metric, sign, other, factor));
        self
    }

    fn keyed(mut self, key: &'static str) -> Self {
        self.key = key;
        self
    }

    fn with(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }
}

fn memory() -> Vec<Table> {
    let bytes = |scenario, label| row("bench-memory", "mpsc", 1_000_000, scenario, label);
    let json = |scenario, label| row("bench-memory", "mpsc-json", 1_000_000, scenario, label);
    let latency = |scenario, label| row("bench-memory", "mpsc-latency", 2_000, scenario, label);
    vec![
        Table {
            id: "memory-bytes",
            title: "In process, one thread, 256 bytes",
            note: "CPU time a message; the ratio is how many times as fast as the bare bounded channel.",
            metric: "cpu_ns",
            less_is_better: true,
            counts: true,
            rounds: 7,
            quick_rounds: 3,
            rows: vec![
                bytes("mpsc", "tokio mpsc, bounded"),
                bytes("mpsc-many", "tokio mpsc, recv_many 128"),
                bytes("mpsc-vectors", "tokio mpsc, a Vec of 128 an item: no path can be faster"),
                bytes("polymq", "polymq handler, one by one").bar("ratio", ">=", 0.75).bar("allocations", "<=", 2.02),
                bytes("polymq-bytes", "polymq handler that keeps the bytes (Body)"),
                bytes("ruststream", "RustStream #[subscriber], one by one"),
                bytes("polymq-batch", "polymq, send_all and handler of 128").bar("ratio", ">=", 1.8).bar(
                    "allocations",
                    "<=",
                    1.1,
                ),
                bytes("polymq-batch-bytes", "polymq, the same, keeping the bytes (Body)"),
                bytes("ruststream-batch", "RustStream, handler of 128"),
                bytes("mq-bridge-batch", "mq-bridge, batches of 128 (loses what is refused)"),
                bytes("mq-bridge-batch-nack", "mq-bridge, batches of 128, nack support on"),
                bytes("polymq-dyn", "polymq by hand: send, next, ack").bar("ratio", ">=", 0.7).bar(
                    "allocations",
                    "<=",
                    4.0,
                ),
                bytes("ruststream-traits", "RustStream raw traits: publish, stream, ack (not dyn)"),
                bytes("omniqueue-dyn", "omniqueue dyn: send_raw, receive, ack"),
            ],
        },
        Table {
            id: "memory-json",
            title: "In process, one thread, a small JSON message",
            note: "Encoded and decoded on every path, the bare channel's included.",
            metric: "cpu_ns",
            less_is_better: true,
            counts: true,
            rounds: 7,
            quick_rounds: 3,
            rows: vec![
                json("mpsc-json", "tokio mpsc and serde_json"),
                json("polymq-json", "polymq handler, one by one").against("instructions", "<=", "ruststream-json", 1.0),
                json("ruststream-json", "RustStream #[subscriber], one by one"),
                json("polymq-json-batch", "polymq, send_all and handler of 128").against(
                    "instructions",
                    "<=",
                    "ruststream-json-batch",
                    1.0,
                ),
                json("ruststream-json-batch", "RustStream, handler of 128"),
            ],
        },
        Table {
            id: "memory-latency",
            title: "In process, one thread, one message a millisecond",
            note: "",
            metric: "p50_us",
            less_is_better: true,
            counts: false,
            rounds: 5,
            quick_rounds: 3,
            rows: vec![
                latency("mpsc-latency", "tokio mpsc, bounded"),
                latency("polymq-latency", "polymq handler").against("p50_us", "<=", "mpsc-latency", 1.2).against(
                    "p99_us",
                    "<=",
                    "mpsc-latency",
                    1.2,
                ),
                latency("ruststream-latency", "RustStream #[subscriber]"),
            ],
        },
    ]
}

/// The same rows for each size and number of workers.
const CASES: [(&str, u64, &str); 4] =
    [("256 bytes", 256, "1"), ("256 bytes", 256, "8"), ("16 KiB", 16 * 1024, "1"), ("16 KiB", 16 * 1024, "8")];

fn amqp(quick: bool) -> Vec<Table> {
    let mut tables = Vec::new();
    for (at, (_, size, workers)) in CASES.into_iter().enumerate() {
        let n = if size > 1024 { 4_000 } else { 16_000 };
        let case = |scenario, label, baseline| {
            row("bench-amqp", baseline, n, scenario, label)
                .with(format!("size={size}"))
                .with(format!("workers={workers}"))
        };
        tables.push(Table {
            id: ["amqp-publish-small-1", "amqp-publish-small-8", "amqp-publish-large-1", "amqp-publish-large-8"][at],
            title: [
                "RabbitMQ, publish, 256 bytes, one task",
                "RabbitMQ, publish, 256 bytes, eight tasks",
                "RabbitMQ, publish, 16 KiB, one task",
                "RabbitMQ, publish, 16 KiB, eight tasks",
            ][at],
            note: "Durable queue, persistent messages, until the last confirm; 128 unconfirmed a task.",
            metric: "per_second",
            less_is_better: false,
            counts: false,
            rounds: 5,
            quick_rounds: 1,
            rows: vec![
                case("raw-publish", "lapin, sliding window", "raw-publish"),
                case("raw-publish-ids", "lapin, the same with an id and a time", "raw-publish"),
                case("polymq-publish", "polymq, send_all", "raw-publish").bar("ratio", ">=", 0.95),
                case("ruststream-publish", "ruststream-lapin, confirms, 128 at a time (not mandatory)", "raw-publish"),
                case("omniqueue-publish", "omniqueue (weaker: no confirms, so no window)", "raw-publish"),
            ],
        });
        tables.push(Table {
            id: ["amqp-consume-small-1", "amqp-consume-small-8", "amqp-consume-large-1", "amqp-consume-large-8"][at],
            title: [
                "RabbitMQ, consume, 256 bytes, one worker",
                "RabbitMQ, consume, 256 bytes, eight workers",
                "RabbitMQ, consume, 16 KiB, one worker",
                "RabbitMQ, consume, 16 KiB, eight workers",
            ][at],
            note: "Durable queue, persistent messages, acknowledged after handling, 128 fetched ahead a worker; from the first to the last message handled. What is left unacknowledged at the end is checked to be none.",
            metric: "per_second",
            less_is_better: false,
            counts: false,
            rounds: 5,
            quick_rounds: 1,
            rows: vec![
                case("raw-consume", "lapin, each acknowledged", "raw-consume"),
                case("raw-consume-cumulative", "lapin, acknowledged every 64", "raw-consume"),
                case("polymq-consume", "polymq handler", "raw-consume").bar("ratio", ">=", 2.0),
                case("ruststream-consume", "ruststream-lapin #[subscriber]", "raw-consume"),
                case("omniqueue-consume", "omniqueue, receive and ack", "raw-consume"),
            ],
        });
    }
    tables.extend(upkeep("bench-amqp", "RabbitMQ", quick));
    tables
}

fn mqtt(quick: bool) -> Vec<Table> {
    let mut tables = Vec::new();
    for (at, size) in [256, 16 * 1024].into_iter().enumerate() {
        let n = if size > 1024 { 10_000 } else { 60_000 };
        let case =
            |scenario, label, baseline| row("bench-mqtt", baseline, n, scenario, label).with(format!("size={size}"));
        tables.push(Table {
            id: ["mqtt-publish-small", "mqtt-publish-large"][at],
            title: ["Mosquitto, publish with QoS 1, 256 bytes", "Mosquitto, publish with QoS 1, 16 KiB"][at],
            note: "MQTT 5, until the last PUBACK, 128 unanswered at a time. A queue is a shared subscription with a persistent session, so the broker keeps each message on both paths.",
            metric: "per_second",
            less_is_better: false,
            counts: false,
            rounds: 5,
            quick_rounds: 1,
            rows: vec![
                case("raw-publish", "rumqttc, sliding window", "raw-publish"),
                case("polymq-publish", "polymq, send_all", "raw-publish").bar("ratio", ">=", 0.95),
            ],
        });
        tables.push(Table {
            id: ["mqtt-consume-small", "mqtt-consume-large"][at],
            title: ["Mosquitto, end to end with QoS 1, 256 bytes", "Mosquitto, end to end with QoS 1, 16 KiB"][at],
            note: "One process publishes and consumes over two connections; acknowledged after handling.",
            metric: "per_second",
            less_is_better: false,
            counts: false,
            rounds: 5,
            quick_rounds: 1,
            rows: vec![
                case("raw-consume", "rumqttc, manual acknowledgements", "raw-consume"),
                case("polymq-consume", "polymq, send_all and handler", "raw-consume"),
            ],
        });
    }
    tables.extend(upkeep("bench-mqtt", "Mosquitto", quick));
    tables
}

/// Memory of a slow consumer and the price of an idle one.
fn upkeep(program: &'static str, broker: &'static str, quick: bool) -> Vec<Table> {
    let resident =
        |key, label, n, size| row(program, "", n, "polymq-resident", label).keyed(key).with(format!("size={size}"));
    let (resident_title, idle_title) = match broker {
        "RabbitMQ" => ("RabbitMQ, memory of a slow consumer", "RabbitMQ, idle consumer"),
        _ => ("Mosquitto, memory of a slow consumer", "Mosquitto, idle consumer"),
    };
    let table = |id, title, note, metric, rows| Table {
        id,
        title,
        note,
        metric,
        less_is_better: true,
        counts: false,
        rounds: 1,
        quick_rounds: 1,
        rows,
    };
    let (resident_id, idle_id) =
        if broker == "RabbitMQ" { ("amqp-resident", "amqp-idle") } else { ("mqtt-resident", "mqtt-idle") };
    vec![
        table(
            resident_id,
            resident_title,
            "Growth of resident memory while many messages wait and a handler takes 10 ms each; it must stay with the prefetch, not with what waits.",
            "growth_bytes",
            vec![
                resident("small", "polymq, 100 000 of 256 bytes wait", 100_000, 256).bar("growth_bytes", "<=", 16e6),
                resident("large", "polymq, 10 000 of 16 KiB wait", 10_000, 16 * 1024).bar("growth_bytes", "<=", 32e6),
            ],
        ),
        table(
            idle_id,
            idle_title,
            "Processor time of the whole process while nothing comes.",
            "cpu_percent",
            vec![
                row(program, "", 1, "polymq-idle", "polymq").with(if quick { "seconds=5" } else { "seconds=20" }).bar(
                    "cpu_percent",
                    "<=",
                    1.0,
                ),
            ],
        ),
    ]
}
