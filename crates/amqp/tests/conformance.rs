//! The suite of polymq-testkit on a real RabbitMQ.

mod rabbitmq;

use std::process::ExitCode;

use polymq_testkit::Suite;
use rabbitmq::RabbitMq;

fn main() -> ExitCode {
    // What only this broker has; Mosquitto starts faster, and catches the rest.
    Suite::new("amqp", |_| RabbitMq::start("classic")).and_mutants_of(&["F13_alarm"]).main()
}
