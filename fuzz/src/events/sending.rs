//! Sending events: stored ones, plain ones and bad ones, one by one and over a stream.

use arbitrary::Arbitrary;
use polymq_kubemq_proto::Event;

use super::Model;

#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Mixed {
    Stored,
    Plain { channel: u8 },
    Bad { stored: bool, how: u8 },
}

impl Model {
    /// The event that will be stored as this one.
    fn stored_event(&self, sequence: u64) -> Event {
        Event {
            event_id: format!("stored {sequence}"),
            client_id: "fuzz".into(),
            channel: self.name.clone(),
            body: sequence.to_be_bytes().to_vec().into(),
            store: true,
            ..Event::default()
        }
    }

    /// One more event is stored.
    fn was_stored(&mut self) {
        self.stored += 1;
        for group in &mut self.groups {
            group.told(self.stored);
        }
    }

    pub(super) async fn store(&mut self, count: u8) {
        self.mix(&vec![Mixed::Stored; count.into()]).await;
    }

    /// An event, and how its refusal begins.
    fn mixed(&mut self, event: Mixed) -> (Event, Option<&'static str>) {
        match event {
            Mixed::Stored => (self.stored_event(self.stored + 1), None),
            Mixed::Plain { channel } => (self.plain_event(channel), None),
            Mixed::Bad { stored, how } => {
                let mut event = Event { store: stored, ..self.stored_event(0) };
                event.event_id = format!("bad {how}");
                let error = match how % 6 {
                    0 => {
                        event.client_id.clear();
                        "Error 101"
                    }
                    1 => {
                        event.channel.clear();
                        "Error 102"
                    }
                    2 => {
                        event.channel += ".*";
                        "Error 107"
                    }
                    3 => {
                        event.channel += " ";
                        "Error 108"
                    }
                    4 => {
                        event.channel += ".";
                        "Error 119"
                    }
                    _ => {
                        event.body.clear();
                        "Error 110"
                    }
                };
                (event, Some(error))
            }
        }
    }

    /// Over one stream: stored events are answered in their order, plain ones when they are refused; then the stream ends.
    pub(super) async fn mix(&mut self, events: &[Mixed]) {
        self.times.begin();
        let (mut sent, mut expected) = (Vec::new(), Vec::new());
        for event in events.iter().take(8) {
            let (event, error) = self.mixed(*event);
            if event.store || error.is_some() {
                expected.push((event.event_id.clone(), error));
            }
            match (error, event.store) {
                (None, true) => self.was_stored(),
                (None, false) => self.expect(&event),
                _ => {}
            }
            sent.push(event);
        }
        let mut answers = self.client.send_events_stream(tokio_stream::iter(sent)).await.unwrap().into_inner();
        for (id, error) in expected {
            let answer = answers.message().await.unwrap().expect("an answer an event that has one");
            assert_eq!(answer.event_id, id, "in order");
            assert_eq!(answer.sent, error.is_none(), "{answer:?}");
            assert!(answer.error.starts_with(error.unwrap_or_default()), "{answer:?}");
        }
        let more = answers.message().await.unwrap();
        assert!(more.is_none(), "an answer to nothing: {more:?}");
    }

    pub(super) async fn tell(&mut self, event: Mixed) {
        self.times.begin();
        let (event, error) = self.mixed(event);
        let id = event.event_id.clone();
        match (error, event.store) {
            (None, true) => self.was_stored(),
            (None, false) => self.expect(&event),
            _ => {}
        }
        match (self.client.send_event(event).await, error) {
            (Ok(answer), None) => {
                let answer = answer.into_inner();
                assert!(answer.sent && answer.event_id == id && answer.error.is_empty(), "{answer:?}");
            }
            (Err(status), Some(error)) => assert!(status.message().starts_with(error), "{status}"),
            (other, _) => panic!("{error:?}: {other:?}"),
        }
    }
}
