//! What is measured in process, and what design asks of it.

use harness::plan::{Plan, Row, Table};

pub fn plan(_quick: bool) -> Plan {
    Plan { brokers: Vec::new(), tables: vec![bytes(), json(), latency()] }
}

fn bytes() -> Table {
    let row = |scenario, label| Row::new(scenario, 1_000_000, label);
    Table::new("memory-bytes", "In process, one thread, 256 bytes")
        .note("CPU time a message; the ratio is how many times as fast as the bare bounded channel.")
        .less_of("cpu_ns")
        .compared_with("mpsc")
        .rounds(7, 3)
        .counted()
        .rows([
            row("mpsc", "tokio mpsc, bounded"),
            row("mpsc-many", "tokio mpsc, recv_many 128"),
            row("mpsc-vectors", "tokio mpsc, a Vec of 128 an item: no path can be faster"),
            row("polymq", "polymq handler, one by one").bar("ratio", ">=", 0.75).bar("allocations", "<=", 2.02),
            row("polymq-bytes", "polymq handler that keeps the bytes (Body)"),
            row("ruststream", "RustStream #[subscriber], one by one"),
            row("polymq-batch", "polymq, send_all and handler of 128").bar("ratio", ">=", 1.8).bar(
                "allocations",
                "<=",
                1.1,
            ),
            row("polymq-batch-bytes", "polymq, the same, keeping the bytes (Body)"),
            row("ruststream-batch", "RustStream, handler of 128"),
            row("mq-bridge-batch", "mq-bridge, batches of 128 (loses what is refused)"),
            row("mq-bridge-batch-nack", "mq-bridge, batches of 128, nack support on"),
            row("polymq-dyn", "polymq by hand: send, next, ack").bar("ratio", ">=", 0.7).bar("allocations", "<=", 4.0),
            row("ruststream-traits", "RustStream raw traits: publish, stream, ack (not dyn)"),
            row("omniqueue-dyn", "omniqueue dyn: send_raw, receive, ack"),
        ])
}

fn json() -> Table {
    let row = |scenario, label| Row::new(scenario, 1_000_000, label);
    Table::new("memory-json", "In process, one thread, a small JSON message")
        .note("Encoded and decoded on every path, the bare channel's included.")
        .less_of("cpu_ns")
        .compared_with("mpsc-json")
        .rounds(7, 3)
        .counted()
        .rows([
            row("mpsc-json", "tokio mpsc and serde_json"),
            row("polymq-json", "polymq handler, one by one").against("instructions", "<=", "ruststream-json", 1.0),
            row("ruststream-json", "RustStream #[subscriber], one by one"),
            row("polymq-json-batch", "polymq, send_all and handler of 128").against(
                "instructions",
                "<=",
                "ruststream-json-batch",
                1.0,
            ),
            row("ruststream-json-batch", "RustStream, handler of 128"),
        ])
}

fn latency() -> Table {
    let row = |scenario, label| Row::new(scenario, 2_000, label);
    Table::new("memory-latency", "In process, one thread, one message a millisecond")
        .less_of("p50_us")
        .compared_with("mpsc-latency")
        .rounds(5, 3)
        .rows([
            row("mpsc-latency", "tokio mpsc, bounded"),
            row("polymq-latency", "polymq handler").against("p50_us", "<=", "mpsc-latency", 1.2).against(
                "p99_us",
                "<=",
                "mpsc-latency",
                1.2,
            ),
            row("ruststream-latency", "RustStream #[subscriber]"),
        ])
}
