//! Mission rows A2, A3: backends by name, those of third parties too.

mod toy;

use std::time::Duration;

use polymq_core::{Bus, ConsumeOptions, ConsumerFactory, Environment, Registry};
use polymq_testkit::TestService;

/// What any program does: it knows no backend.
async fn echo(bus: &Bus, text: &str) -> String {
    // The toy lives in this process, and so do the other tests.
    let queue = bus.queue(format!("echo-{:016x}", fastrand::u64(..)));
    queue.send(&text.to_owned()).await.expect("send");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let mut deliveries = subscription.receive(1, Duration::from_secs(5)).await.expect("receive");
    let delivery = deliveries.pop().expect("the message");
    let body = String::from_utf8_lossy(delivery.message().payload()).into_owned();
    delivery.ack().await.expect("ack");
    body
}

#[tokio::test]
async fn a2_every_registered_name_gives_a_working_pair() {
    let registry = Registry::linked();
    let names: Vec<_> = registry.names().collect();
    assert!(names.contains(&"memory") && names.contains(&"toy"), "{names:?}");
    for name in names {
        for spelling in [name.to_owned(), name.to_uppercase()] {
            assert_eq!(registry.backend(&spelling).expect("by any case").name(), name);
        }
        let bus = Bus::builder().environment(Environment::default()).backend(name).connect().await.expect("connect");
        assert_eq!(echo(&bus, name).await, format!("{name:?}"));
    }
}

#[tokio::test]
async fn a3_a_third_partys_backend_is_selected_by_its_name() {
    for variables in [("POLYMQ_BACKEND", "toy"), ("POLYMQ_BACKEND", "Toy"), ("POLYMQ_URL", "toy://")] {
        let environment: Environment = [variables].into_iter().collect();
        let bus = Bus::builder().environment(environment).connect().await.expect("connect");
        assert_eq!(bus.backend(), "toy");
        assert_eq!(echo(&bus, "hello").await, "\"hello\"");
    }
}

#[tokio::test]
async fn a3_handlers_run_on_it_unchanged() {
    let bus = Bus::builder().environment(Environment::default()).backend("toy").connect().await.expect("connect");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("doubled", async |n: u64, context: polymq_core::Context| {
        context.bus().queue("answers").send(&(n * 2)).await.map(drop)
    });
    let service = TestService::start(consumers).await.expect("start");
    bus.queue("doubled").send(&21_u64).await.expect("send");
    let mut answers = bus.queue("answers").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let delivery = answers.next().await.expect("an answer");
    assert_eq!(delivery.message().payload(), "42");
    delivery.ack().await.expect("ack");
    service.stop().await.expect("stop");
}
