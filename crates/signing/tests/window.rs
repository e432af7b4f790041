//! For how long a signed message is believed.
#![allow(missing_docs)]

use std::time::{Duration, SystemTime};

use polymq_core::{Bus, ConsumerFactory, ConsumerRunner, Environment, Message};
use polymq_signing::{PublicKeys, Signer, SigningKey, Verifier};

/// It is handled once and is not given up, whenever it was made; its copy is not believed.
#[tokio::test(start_paused = true)]
async fn a_window_without_a_limit_believes_for_ever_and_once() {
    let (key, _) = SigningKey::generate("ours").expect("a key");
    let known = PublicKeys::new().with(key.id(), key.public()).expect("a public key");
    let url = || Bus::builder().url("memory://signing-window").environment(Environment::default());
    let sender = url().layer(Signer::new(key)).connect().await.expect("connects");
    let verifier = Verifier::new(known).window(Duration::MAX);
    let receiver = url().layer(verifier).connect().await.expect("connects");
    let mut consumers = ConsumerFactory::new(&receiver);
    consumers.route("orders", async |_: Message| {});
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for (id, time) in [("old", SystemTime::UNIX_EPOCH + Duration::from_secs(1)), ("new", SystemTime::now())] {
        let message = Message::new("x").with_id(id).with_time(time);
        for _ in 0..2 {
            sender.queue("orders").send_message(message.clone()).await.expect("sent");
        }
    }
    tokio::time::sleep(Duration::from_secs(3600)).await;
    running.stop().await.expect("stops");
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.handled, stats.panicked, stats.dead_lettered), (2, 0, 2));
}
