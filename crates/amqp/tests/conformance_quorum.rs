//! The suite of polymq-testkit on a real RabbitMQ whose queues are quorum queues.

mod rabbitmq;

use std::process::ExitCode;

use polymq_testkit::Suite;
use rabbitmq::RabbitMq;

fn main() -> ExitCode {
    Suite::new("amqp_quorum", |_| RabbitMq::start("quorum")).main()
}
