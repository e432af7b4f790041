//! polymq's broker beside RabbitMQ and NATS JetStream, each by the best loop written by hand on its own client. A send
//! counts when its confirm is there, a message when it was handled, and it is acknowledged after that.

mod latency;
mod nats;
mod plan;
mod polymq;
mod rabbitmq;
mod server;

/// A name of this process's own, so that nothing of an earlier run is in it.
fn queue() -> String {
    format!("bench-{}", std::process::id())
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    if let (Some("serve"), Some(address), Some(folder)) =
        (arguments.next().as_deref(), arguments.next(), arguments.next())
    {
        return server::serve(&address, &folder);
    }
    harness::main(
        plan::plan,
        harness::scenarios![
            "polymq-publish" => polymq::publish,
            "polymq-consume" => polymq::consume,
            "polymq-latency" => polymq::latency,
            "rabbitmq-publish" => rabbitmq::publish,
            "rabbitmq-consume" => rabbitmq::consume,
            "rabbitmq-latency" => rabbitmq::latency,
            "nats-publish" => nats::publish,
            "nats-consume" => nats::consume,
            "nats-latency" => nats::latency,
            "start" => server::start,
            "stored" => server::stored,
        ],
    );
}
