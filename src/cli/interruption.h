// What a signal that ends the program leaves behind: nothing half-written.
#pragma once

#include <string>

namespace kvreplay::cli {

/// From here on, an interruption from the keyboard, a request to terminate and the loss of the terminal remove
/// unfinished output files before they end the process, as it would have ended without. Signals that are ignored (as by
/// nohup) stay so. To be called once, before any other thread is started.
void clean_up_when_interrupted();

/// What is said then, after "kvreplay: interrupted; ". Nothing at all where it is empty.
void say_when_interrupted(std::string text);

}  // namespace kvreplay::cli
