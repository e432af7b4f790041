//! What is measured on Mosquitto, and what design asks of it.

use harness::plan::{Broker, Plan, Row, Table, upkeep};

pub fn plan(quick: bool) -> Plan {
    let mut tables = Vec::new();
    // Enough that what happens once, at the end, is little: Mosquitto keeps its last answers back until TCP acknowledges.
    for (size, id, bytes, messages) in [("256 bytes", "small", 256, 60_000), ("16 KiB", "large", 16 * 1024, 20_000)] {
        let row = |scenario, label| Row::new(scenario, messages, label).with(format!("size={bytes}"));
        tables.push(
            Table::new(format!("mqtt-publish-{id}"), format!("Mosquitto, publish with QoS 1, {size}"))
                .note(
                    "MQTT 5, until the last PUBACK, 128 unanswered at a time. A queue is a shared subscription with a \
                     persistent session, so the broker keeps each message on both paths.",
                )
                .compared_with("raw-publish")
                .rows([
                    row("raw-publish", "rumqttc, sliding window"),
                    row("polymq-publish", "polymq, send_all").bar("ratio", ">=", 0.95),
                ]),
        );
        tables.push(
            Table::new(format!("mqtt-consume-{id}"), format!("Mosquitto, end to end with QoS 1, {size}"))
                .note("One process publishes and consumes over two connections; acknowledged after handling.")
                .compared_with("raw-consume")
                .rows([
                    row("raw-consume", "rumqttc, manual acknowledgements"),
                    row("polymq-consume", "polymq, send_all and handler"),
                ]),
        );
    }
    tables.extend(upkeep("mqtt", "Mosquitto", quick));
    Plan { brokers: vec![Broker::new("mosquitto", &["--volatile"], "mqtt://127.0.0.1:{port}")], tables }
}
