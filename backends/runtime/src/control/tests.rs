use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use cleave_common::control::{Client, MAX_CLIENTS};
use serde_json::{Map, json};

use super::*;

/// Remembers what it was told, and how long a file is that it was given.
#[derive(Default)]
struct Shelf(Mutex<Vec<String>>);

impl Control for Shelf {
    fn commands(&self) -> &'static [&'static str] {
        &["put", "query-shelf", "measure"]
    }

    fn execute(&self, mut request: Request) -> Result<Value, ControlError> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Put {
            what: String,
        }
        match request.command.as_str() {
            "put" => {
                self.0.lock().unwrap().push(request.arguments::<Put>()?.what);
                Ok(nothing())
            }
            "measure" => {
                let file = std::fs::File::from(request.single_fd()?);
                Ok(json!(file.metadata().unwrap().len()))
            }
            _ => value_of(&*self.0.lock().unwrap()),
        }
    }
}

fn shelf() -> (tempfile::TempDir, std::path::PathBuf, ControlServer) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let server = ControlSocket::bind(&path).unwrap().serve("cleave-shelf", Arc::<Shelf>::default()).unwrap();
    (directory, path, server)
}

fn arguments(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn commands_are_carried_out_and_answered() {
    let (_directory, path, server) = shelf();
    let mut client = Client::connect(&path).unwrap();
    let mut other = Client::connect(&path).unwrap();
    client.call("put", &arguments(json!({"what": "a book"})), &[]).unwrap();
    assert_eq!(other.call("query-shelf", &Map::new(), &[]).unwrap(), json!(["a book"]));
    let error = other.call("put", &arguments(json!({"that": "a book"})), &[]).unwrap_err();
    assert_eq!(error.to_string(), "put: unknown field `that`, expected `what`");
    let error = other.call("puy", &Map::new(), &[]).unwrap_err();
    assert!(error.to_string().starts_with("unknown command 'puy' (did you mean 'put'?)"), "{error}");
    let commands = other.call("query-commands", &Map::new(), &[]).unwrap();
    assert_eq!(commands[0], json!({"name": "put"}));
    drop(server);
    assert!(!path.exists(), "the socket's file is removed");
}

#[test]
fn a_file_comes_along_with_its_command() {
    let (directory, path, _server) = shelf();
    let file = directory.path().join("file");
    std::fs::write(&file, [0; 77]).unwrap();
    let file = std::fs::File::open(&file).unwrap();
    let mut client = Client::connect(&path).unwrap();
    assert_eq!(client.call("measure", &Map::new(), &[file.as_fd()]).unwrap(), json!(77));
    let error = client.call("measure", &Map::new(), &[]).unwrap_err();
    assert_eq!(error.to_string(), "measure: no descriptor came along");
}

#[test]
fn a_client_that_misbehaves_costs_only_itself() {
    let (_directory, path, _server) = shelf();
    let mut good = Client::connect(&path).unwrap();
    // It never ends its line.
    let mut long = UnixStream::connect(&path).unwrap();
    long.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let endless = vec![b'x'; 2 * cleave_common::control::MAX_LINE];
    let _ = long.write_all(&endless);
    let mut said = String::new();
    let _ = long.read_to_string(&mut said);
    assert!(said.contains("a line is longer than 65536 bytes"), "{said}");
    // It asks and asks, and reads nothing.
    let mut deaf = UnixStream::connect(&path).unwrap();
    deaf.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let asked = (0..200_000).try_for_each(|_| deaf.write_all(b"{\"execute\": \"query-commands\"}\n"));
    assert!(asked.is_err(), "it is dropped");
    // It does not speak JSON, and is told so.
    let mut rude = UnixStream::connect(&path).unwrap();
    rude.write_all(b"GET / HTTP/1.1\n").unwrap();
    rude.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = String::new();
    rude.read_to_string(&mut said).unwrap();
    assert!(said.contains("this is no JSON"), "{said}");
    good.call("query-shelf", &Map::new(), &[]).unwrap();
}

#[test]
fn as_many_clients_as_there_is_room_for_and_then_the_next() {
    let (_directory, path, _server) = shelf();
    let mut clients: Vec<Client> = (0..MAX_CLIENTS).map(|_| Client::connect(&path).unwrap()).collect();
    let late = thread::spawn(move || Client::connect(&path).unwrap().call("query-shelf", &Map::new(), &[]));
    for client in &mut clients {
        client.call("query-shelf", &Map::new(), &[]).unwrap();
    }
    drop(clients);
    late.join().unwrap().unwrap();
}
