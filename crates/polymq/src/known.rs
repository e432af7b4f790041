//! The backends of this project, linked or not, so that a name that is not compiled in is not called unknown.

use polymq_core::{__private::inventory, KnownBackend};

/// A feature, and what else its backend is called: by the names of configurations, and by URLs.
macro_rules! known {
    ($feature:literal: $($other:literal),*) => {
        inventory::submit! { KnownBackend { name: $feature, others: &[$($other),*], hint: concat!(
            "add the feature \"", $feature, "\" of the crate polymq; the command line is installed with --features ", $feature
        ) } }
    };
}

known!("amqp": "amqps", "rabbitmq", "rmq", "RMQIOHandler");
known!("embedded":);
known!("http": "https", "HTTPHandler");
known!("kafka": "kafkas", "KafkaHandler");
known!("kubemq": "kubemqs");
known!("mqtt": "mqtts");
known!("sqs": "sqss", "sns", "aws");
