//! The backends of this project, linked or not, so that a name that is not compiled in is not called unknown.

use polymq_core::{__private::inventory, KnownBackend};

/// Schemes too: they are what stands in a URL.
macro_rules! known {
    ($feature:literal: $($name:literal),*) => {$(
        inventory::submit! { KnownBackend { name: $name, hint: concat!(
            "add the feature \"", $feature, "\" of the crate polymq; the command line is installed with --features ", $feature
        ) } }
    )*};
}

known!("amqp": "amqp", "amqps");
known!("http": "http", "https");
known!("kafka": "kafka", "kafkas");
known!("mqtt": "mqtt", "mqtts");
known!("sqs": "sqs", "sqss");
known!("embedded": "embedded");
known!("kubemq": "kubemq", "kubemqs");
