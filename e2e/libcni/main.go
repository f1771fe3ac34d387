// Command libcni executes one operation of a network configuration list with the library that container
// runtimes use (libcni). It prints the result of ADD.
//
// Usage: libcni ADD|CHECK|DEL CONFLIST NETNS CONTAINER-ID BIN-DIR CACHE-DIR CAPABILITIES
//
// CAPABILITIES is a JSON object with the runtime's capability arguments.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/containernetworking/cni/libcni"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 7 {
		return fmt.Errorf("got %d arguments, expected 7", len(args))
	}
	list, err := libcni.ConfListFromFile(args[1])
	if err != nil {
		return fmt.Errorf("cannot read the network configuration list: %w", err)
	}
	config := libcni.NewCNIConfigWithCacheDir([]string{args[4]}, args[5], nil)
	runtime := &libcni.RuntimeConf{
		ContainerID: args[3],
		NetNS:       args[2],
		IfName:      "eth0",
		Args:        [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAME", "web"}, {"K8S_POD_NAMESPACE", "ns"}},
	}
	if err := json.Unmarshal([]byte(args[6]), &runtime.CapabilityArgs); err != nil {
		return fmt.Errorf("cannot read the capability arguments: %w", err)
	}
	ctx := context.Background()
	switch args[0] {
	case "ADD":
		if _, err := config.ValidateNetworkList(ctx, list); err != nil {
			return fmt.Errorf("validate: %w", err)
		}
		result, err := config.AddNetworkList(ctx, list, runtime)
		if err != nil {
			return fmt.Errorf("add: %w", err)
		}
		cached, err := config.GetNetworkListCachedResult(list, runtime)
		if err != nil || cached == nil {
			return fmt.Errorf("no cached result: %w", err)
		}
		return result.Print()
	case "CHECK":
		return config.CheckNetworkList(ctx, list, runtime)
	case "DEL":
		return config.DelNetworkList(ctx, list, runtime)
	default:
		return fmt.Errorf("unknown operation %s, expected ADD, CHECK or DEL", args[0])
	}
}
