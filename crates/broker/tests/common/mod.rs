//! What the tests of limits and safety share: clients and messages.
#![allow(dead_code)] // each test binary uses a part

use std::{net::SocketAddr, result::Result, time::Duration};

use polymq_broker::Broker;
use polymq_kubemq_proto::{kubemq_client::KubemqClient, subscribe::*, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

pub(crate) type Client = KubemqClient<InterceptedService<Channel, Token>>;

/// Puts a token to every call.
#[derive(Clone)]
pub(crate) struct Token(Option<String>);

impl Interceptor for Token {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", MetadataValue::try_from(token).unwrap());
        }
        Ok(request)
    }
}

pub(crate) async fn channel(broker: &Broker) -> Channel {
    channel_at(broker.address()).await
}

async fn channel_at(address: SocketAddr) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

pub(crate) async fn client(broker: &Broker) -> Client {
    client_at(broker.address()).await
}

pub(crate) async fn client_at(address: SocketAddr) -> Client {
    KubemqClient::with_interceptor(channel_at(address).await, Token(None))
}

pub(crate) async fn client_with(broker: &Broker, token: &str) -> Client {
    KubemqClient::with_interceptor(channel(broker).await, Token(Some(token.trim().to_owned())))
}

pub(crate) fn message(queue: &str, body: impl Into<Vec<u8>>) -> QueueMessage {
    QueueMessage {
        client_id: "test".into(),
        channel: queue.into(),
        body: body.into().into(),
        ..QueueMessage::default()
    }
}

pub(crate) fn event(channel: &str, body: impl Into<Vec<u8>>, store: bool) -> Event {
    Event { client_id: "test".into(), channel: channel.into(), body: body.into().into(), store, ..Event::default() }
}

pub(crate) async fn send(client: &mut Client, message: QueueMessage) -> SendQueueMessageResult {
    client.send_queue_message(message).await.unwrap().into_inner()
}

pub(crate) fn receiving(queue: &str, most: i32) -> ReceiveQueueMessagesRequest {
    ReceiveQueueMessagesRequest {
        client_id: "test".into(),
        channel: queue.into(),
        max_number_of_messages: most,
        wait_time_seconds: 1,
        ..ReceiveQueueMessagesRequest::default()
    }
}

pub(crate) async fn receive(client: &mut Client, queue: &str, most: i32) -> Vec<String> {
    let answer = client.receive_queue_messages(receiving(queue, most)).await.unwrap().into_inner();
    assert!(!answer.is_error, "{}", answer.error);
    answer.messages.iter().map(|message| String::from_utf8(message.body.to_vec()).unwrap()).collect()
}

pub(crate) fn subscribe(kind: SubscribeType, channel: &str, start: EventsStoreType) -> Subscribe {
    Subscribe {
        subscribe_type_data: kind.into(),
        client_id: "test".into(),
        channel: channel.into(),
        events_store_type_data: start.into(),
        ..Subscribe::default()
    }
}

pub(crate) async fn next(stream: &mut tonic::Streaming<EventReceive>) -> EventReceive {
    tokio::time::timeout(Duration::from_secs(60), stream.message()).await.expect("in time").unwrap().unwrap()
}

/// Connects and pings.
pub(crate) async fn pinged(broker: &Broker) -> Result<(), tonic::Status> {
    let channel = Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect_lazy();
    KubemqClient::new(channel).ping(Empty {}).await.map(drop)
}

/// The status and the body that HTTP answers.
pub(crate) async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: broker\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}
