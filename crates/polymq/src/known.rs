//! The backends of this project, linked or not, so that a name that is not compiled in is not called unknown.

use polymq_core::{__private::inventory, KnownBackend};

const fn feature(name: &'static str, hint: &'static str) -> KnownBackend {
    KnownBackend { name, hint }
}

const AMQP: &str = "add the feature \"amqp\" of the crate polymq";
const EMBEDDED: &str = "add the feature \"embedded\" of the crate polymq";
const HTTP: &str = "add the feature \"http\" of the crate polymq";
const KAFKA: &str = "add the feature \"kafka\" of the crate polymq";
const KUBEMQ: &str = "add the feature \"kubemq\" of the crate polymq";
const MQTT: &str = "add the feature \"mqtt\" of the crate polymq";
const SQS: &str = "add the feature \"sqs\" of the crate polymq";

// Schemes too: they are what stands in a URL.
inventory::submit! { feature("amqp", AMQP) }
inventory::submit! { feature("amqps", AMQP) }
inventory::submit! { feature("http", HTTP) }
inventory::submit! { feature("https", HTTP) }
inventory::submit! { feature("kafka", KAFKA) }
inventory::submit! { feature("kafkas", KAFKA) }
inventory::submit! { feature("mqtt", MQTT) }
inventory::submit! { feature("mqtts", MQTT) }
inventory::submit! { feature("sqs", SQS) }
inventory::submit! { feature("sqss", SQS) }
inventory::submit! { feature("embedded", EMBEDDED) }
inventory::submit! { feature("kubemq", KUBEMQ) }
inventory::submit! { feature("kubemqs", KUBEMQ) }
