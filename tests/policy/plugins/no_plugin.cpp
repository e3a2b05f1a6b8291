// A shared library like any other.
int answer();
int answer() { return 42; }
