//! Channels.

use polymq_kubemq::Pattern;

use crate::start;

/// Channels are made, listed and deleted.
#[tokio::test(flavor = "multi_thread")]
async fn channels_are_managed() {
    let (broker, client) = start().await;
    for pattern in [Pattern::Queues, Pattern::EventsStore, Pattern::Events, Pattern::Commands, Pattern::Queries] {
        client.create_channel(pattern, "mine").await.expect("made");
        let names = |listed: Vec<polymq_kubemq::ChannelInfo>| listed.into_iter().map(|it| it.name).collect::<Vec<_>>();
        assert_eq!(names(client.list_channels(pattern, "min").await.expect("listed")), ["mine"], "{pattern:?}");
        client.delete_channel(pattern, "mine").await.expect("deleted");
        client.delete_channel(pattern, "mine").await.expect("harmless");
        assert!(client.list_channels(pattern, "min").await.expect("listed").is_empty(), "{pattern:?}");
    }
    broker.stop().await;
}
